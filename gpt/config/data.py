"""Where the text comes from."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt.config.checks import UsageError, check, number, quoted

MADE_FROM_TEXT = ("char", "words", "bpe")
"""The tokenizers that are made from the text itself."""
TOKENIZERS = (*MADE_FROM_TEXT, "byte", "gpt2")
Pattern = Literal[
    "gpt2", "smollm", "llama3", "cl100k", "cl100k_base", "qwen2", "tekken", "o200k", "bloom",
    "chinese", "code",
]  # fmt: skip
WindowOrder = Literal["auto", "table", "keyed"]
Records = Literal["auto", "text", "instructions"]
TooLong = Literal["cut", "drop"]
WindowKind = Literal["crossing", "packed", "best_fit"]
TextFormat = Literal["auto", "text", "jsonl", "parquet"]
BadBytes = Literal["refuse", "replace"]


LEAST_BYTE_PAIRS = 257
SHARED = (
    "mixture", "tokenizer", "vocab_size", "pattern", "unknown", "windows", "order", "records",
    "too_long", "cache_dir",
)  # fmt: skip
"""Settings that the sources of a mixture have in common."""
_DESCRIPTOR = re.compile(r"-|/dev/stdin|/(?:dev|proc/self)/fd/([0-9]{1,9})")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "shakespeare"
    """A named corpus (shakespeare), a file (UTF-8 text, .jsonl or .parquet; also .gz, .bz2, .xz or
    .zst), a folder, a pattern such as 'books/*.txt', - for a pipe, or hf://OWNER/NAME."""
    format: TextFormat = "auto"
    """What the files are; auto: by their names; jsonl, parquet: a document in each record."""
    text_field: str = "text"
    """The field of a record, or the column, that holds the text."""
    records: Records = "auto"
    """What the records of a file are; text: documents; instructions: prompts with answers, and only
    the answers count in the loss; auto: instructions if the first record has messages, or prompt
    and completion."""
    too_long: TooLong = "cut"
    """Instructions longer than model.context_length; cut: without their end; drop: left out."""
    separator: str = ""
    r"""Where a text file is split into documents: '\n' is a document a line; empty: one a file."""
    bad_bytes: BadBytes = "refuse"
    """Bytes that are not UTF-8; refuse: name the file and the place; replace: by U+FFFD."""
    tokenizer: str = "char"
    """char: the characters of the text; words: its words; bpe: byte pairs learned from it; byte:
    256 bytes; gpt2: GPT-2's byte pairs; or an encoding of tiktoken (cl100k_base, o200k_base), a
    file (of gpt tokenizer train, tokenizer.json, SentencePiece's .model), or a folder with one."""
    vocab_size: int = number(0, at_least=0, at_most=1 << 24)
    """Tokens of a tokenizer that is made from the text, with the special ones; 0: 8,192 for bpe,
    all words or characters of the text for words and char."""
    pattern: Pattern = "gpt2"
    """How bpe splits a text before it merges bytes: as the named models do; chinese and code are
    for such texts."""
    unknown: bool = False
    """Read words or characters that are not in the vocabulary as <UNK>, with words and char."""
    validation_fraction: float = number(0.05, above=0, below=1)
    """Fraction of the text, at its end, that is held out for validation."""
    windows: WindowKind = "crossing"
    """How the text is cut into windows; crossing: in equal parts, and attention crosses documents;
    packed: in equal parts, with attention inside each document and positions from its start;
    best_fit: as packed, of whole documents, and only those longer than a window are cut."""
    order: WindowOrder = "auto"
    """How each epoch's order of windows is made; table: a shuffled list in memory; keyed: a
    permutation computed window by window, without memory; auto: table up to 4,194,304 windows, and
    what the run began with when it is resumed."""
    mixture: tuple[str, ...] = ()
    """Several sources instead of one: for each a table [[data.mixture]] in TOML, or the same as
    JSON, with its source, its weight (1), perhaps a name, and settings of data that differ."""
    cache_dir: str = ""
    """The folder in which prepared tokens are cached; empty: data/ in the run's folder."""

    def __post_init__(self) -> None:
        check(self, "data.")
        if not self.tokenizer:
            raise UsageError(
                f"data.tokenizer is empty, and must be one of {', '.join(TOKENIZERS)}, an encoding "
                "of tiktoken, or a file"
            )
        check_vocabulary(self.tokenizer, self.vocab_size, unknown=self.unknown, group="data.")
        if self.mixture and self.source != type(self).source:
            raise UsageError(
                f"data.source is {quoted(self.source)}, and data.mixture has its own sources: "
                "leave one of them out"
            )
        self.parts()

    def parts(self) -> "list[Part]":
        """The sources of the mixture. ``UsageError`` names the entry that is wrong."""
        found = [self._part(number, text) for number, text in enumerate(self.mixture, 1)]
        names = [part.name for part in found]
        if again := [name for n, name in enumerate(names) if name in names[:n]]:
            raise UsageError(
                f"data.mixture has two sources with the name {quoted(again[0])}: give each a name"
            )
        return found

    def _part(self, number: int, text: str) -> "Part":
        where = f"data.mixture entry {number}"
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict) or not isinstance(fields.get("source"), str):
            raise UsageError(
                f"{where} is {quoted(text)}, and must be a table with a source, such as "
                '{"source": "book.txt", "weight": 0.5}'
            )
        weight: Any = fields.pop("weight", 1)
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UsageError(f"{where} has the weight {quoted(weight)}, and must be above 0")
        name = fields.pop("name", None)
        own = [item.name for item in dataclasses.fields(self) if item.name not in SHARED]
        for field in fields:
            if field not in own:
                raise UsageError(
                    f"{where} has the setting {quoted(field)}, and a source may have weight, name, "
                    f"{', '.join(own)}"
                )
        try:
            data = dataclasses.replace(self, mixture=(), **fields)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        if data.descriptor is not None:
            raise UsageError(f"{where} is a pipe, and must be a file or a folder")
        if not isinstance(name, str | None):
            raise UsageError(f"{where} has the name {quoted(name)}, and must be a text")
        return Part(name or data.name, float(weight), data)

    @property
    def descriptor(self) -> int | None:
        """The file descriptor that ``source`` names: 0 for ``-``, N for ``/dev/fd/N``; ``None`` for
        anything else.
        """
        match = _DESCRIPTOR.fullmatch(self.source)
        return int(match[1] or 0) if match else None

    @property
    def described(self) -> str:
        """The source, or the sources of the mixture, for a message."""
        return ", ".join(part.data.source for part in self.parts()) or self.source

    @property
    def name(self) -> str:
        """The text's name, as used in the names of runs and caches."""
        if self.mixture:
            return "mixture"
        if self.descriptor is not None:
            return "piped"
        dataset, _, _ = self.source.partition("?")  # the options of hf://OWNER/NAME
        path = Path(dataset if self.source.startswith("hf://") else self.source)
        if path.name in ("", ".."):  # . or ..
            path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() fails for some links
        return path.stem or "text"


class Part(NamedTuple):
    """One source of a mixture."""

    name: str
    weight: float
    data: DataConfig
    """Its source and its settings."""


def check_vocabulary(tokenizer: str, vocab_size: int, *, unknown: bool, group: str = "") -> None:
    """``UsageError`` for a ``vocab_size`` or an ``unknown`` that this tokenizer cannot have; the
    fields' names begin with ``group``.
    """
    size, name = f"{group}vocab_size is {vocab_size:,}", f"{group}tokenizer"
    if unknown and tokenizer not in ("char", "words"):
        raise UsageError(
            f"{group}unknown is for the tokenizers char and words, and {name} is "
            f"{quoted(tokenizer)}"
        )
    if vocab_size and tokenizer not in MADE_FROM_TEXT:
        raise UsageError(
            f"{size}, and is for the tokenizers {', '.join(MADE_FROM_TEXT)}; {quoted(tokenizer)} "
            "has its own size"
        )
    if vocab_size and tokenizer == "char" and not unknown:
        raise UsageError(f"{size}, and char has all characters of the text without {group}unknown")
    if tokenizer == "bpe" and 0 < vocab_size < LEAST_BYTE_PAIRS:
        raise UsageError(
            f"{size}, and must be at least {LEAST_BYTE_PAIRS} for bpe: 256 bytes and end-of-text"
        )
