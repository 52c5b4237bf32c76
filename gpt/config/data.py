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
    """A named corpus (shakespeare), a UTF-8 text file, a folder of such files, or - for a pipe."""
    tokenizer: TokenizerKind = "char"
    """char: the characters of the text; byte: 256 bytes; gpt2: GPT-2's byte-pair encoding."""
    validation_fraction: float = number(0.05, above=0, below=1)
    """Fraction of the text, at its end, that is held out for validation."""
    cache_dir: str = ""
    """The folder in which prepared tokens are cached; empty: data/ in the run's folder."""

    def __post_init__(self) -> None:
        check(self, "data.")

    @property
    def descriptor(self) -> int | None:
        """The file descriptor that ``source`` names: 0 for ``-``, N for ``/dev/fd/N``; ``None`` for
        anything else.
        """
        match = _DESCRIPTOR.fullmatch(self.source)
        return int(match[1] or 0) if match else None

    @property
    def name(self) -> str:
        """The text's name, as used in the names of runs and caches."""
        if self.descriptor is not None:
            return "piped"
        path = Path(self.source)
        if path.name in ("", ".."):  # . or ..
            path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() fails for some links
        return path.stem or "text"
