"""Options of ``gpt tokenizer train | compare | show | export``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.config.checks import UsageError, check, number
from gpt.config.data import BadBytes, DataConfig, Pattern, TextFormat, check_vocabulary


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Options of ``gpt tokenizer train``."""

    source: str
    """The text, as data.source of train.py: a named corpus, a file, a folder, a pattern of paths, -
    for a pipe, or hf://OWNER/NAME."""
    out: Path = Path("tok.json")
    """The file to write; it must not exist. data.tokenizer can name it."""
    tokenizer: Literal["bpe", "words", "char"] = "bpe"
    """bpe: byte pairs learned from the text; words: its words; char: its characters."""
    vocab_size: int = number(0, at_least=0, at_most=1 << 24)
    """Tokens, with the special ones; 0: 8,192 for bpe, all words or characters of the text for
    words and char."""
    pattern: Pattern = "gpt2"
    """How bpe splits a text before it merges bytes: as the named models do; chinese and code are
    for such texts."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens of bpe beside <|endoftext|>, such as <START> <END> <UNK> <PAD>."""
    unknown: bool = False
    """Read words or characters that are not in the vocabulary as <UNK>, with words and char."""
    format: TextFormat = "auto"
    """As data.format of train.py."""
    text_field: str = "text"
    """As data.text_field of train.py."""
    separator: str = ""
    """As data.separator of train.py."""
    bad_bytes: BadBytes = "refuse"
    """As data.bad_bytes of train.py."""
    cache_dir: Path = Path("data")
    """The folder in which the text of a pipe is kept."""

    def __post_init__(self) -> None:
        check(self)
        if self.special_tokens and self.tokenizer != "bpe":
            raise UsageError(
                f"special_tokens are for bpe, and tokenizer is {self.tokenizer}, which has "
                "end-of-text, and <UNK> with unknown"
            )
        check_vocabulary(self.tokenizer, self.vocab_size, unknown=self.unknown)

    @property
    def data(self) -> DataConfig:
        """The same as the settings of a run's text."""
        names = (
            "source", "tokenizer", "vocab_size", "pattern", "unknown", "format", "text_field",
            "separator", "bad_bytes",
        )  # fmt: skip
        return DataConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class TokenizerCompareConfig:
    """Options of ``gpt tokenizer compare``."""

    tokenizers: tuple[str, ...]
    """One or more tokenizers: gpt2, byte, an encoding of tiktoken, a file, or a folder."""
    on: str = "shakespeare"
    """The text to encode, as data.source of train.py."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check(self)
        if not self.tokenizers:
            raise UsageError("tokenizers is empty: name one or more tokenizers before the options")
        if len(set(self.tokenizers)) < len(self.tokenizers):
            raise UsageError(
                f"tokenizers are {', '.join(self.tokenizers)}, and must all be different"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerShowConfig:
    """Options of ``gpt tokenizer show``."""

    text: str
    """The text to encode."""
    tokenizer: str = "gpt2"
    """A tokenizer, as in gpt tokenizer compare."""
    special: bool = False
    """Read the special tokens' texts in the text as these tokens."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TokenizerExportConfig:
    """Options of ``gpt tokenizer export``."""

    tokenizer: str
    """A tokenizer, as in gpt tokenizer compare."""
    out: Path
    """The file to write in the format of tokenizer.json; or a folder for AutoTokenizer, which also
    gets tokenizer_config.json. It must not exist."""

    def __post_init__(self) -> None:
        check(self)
