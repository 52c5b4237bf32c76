"""Where the text comes from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.config.checks import check, number

TokenizerKind = Literal["char", "byte", "gpt2"]


_DESCRIPTOR = re.compile(r"-|/dev/stdin|/(?:dev|proc/self)/fd/([0-9]{1,9})")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "shakespeare"
    """A named corpus (shakespeare), a UTF-8 text file, a folder of them, or - for a pipe."""
    tokenizer: TokenizerKind = "char"
    """char: the corpus's characters; byte: 256 bytes; gpt2: GPT-2's byte-pair encoding."""
    validation_fraction: float = number(0.05, above=0, below=1)
    """The share at the end of the text that is held out."""
    cache_dir: str = ""
    """Where prepared tokens are kept and found again; empty: data/ in the run's folder."""

    def __post_init__(self) -> None:
        check(self, "data.")

    @property
    def descriptor(self) -> int | None:
        """The open file that ``source`` means: 0 for ``-``, N for ``/dev/fd/N``; ``None`` for a
        name.
        """
        match = _DESCRIPTOR.fullmatch(self.source)
        return int(match[1] or 0) if match else None

    @property
    def name(self) -> str:
        """The text's name, for the folders that are made from it."""
        if self.descriptor is not None:
            return "piped"
        path = Path(self.source)
        if path.name in ("", ".."):  # the folder that . or .. means
            path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() fails for some links
        return path.stem or "text"
