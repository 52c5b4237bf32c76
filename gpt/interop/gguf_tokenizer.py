"""A tokenizer as the metadata of a GGUF file (``tokenizer.ggml.*``).

The model ``gpt2`` is a byte-level vocabulary with merges, whose pattern ``pre`` names. The model
``llama`` is one of SentencePiece's: the pair of neighbours whose token has the highest score is
merged first, and characters that are not tokens become bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_pair import END_OF_TEXT
from gpt.data.chat_templates import DEFAULT, ChatTemplates
from gpt.data.patterns import steps_of
from gpt.data.tokenizer import Tokenizer
from gpt.files import about
from gpt.interop.engines import OtherEngineError, byte_pair, library_tokenizer, pairs_of
from gpt.interop.patterns import KNOWN, pattern_of_pre
from gpt.interop.tokenizer_settings import Settings, chat_of
from gpt.interop.vocabulary_export import added_entries, byte_level_definition

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""``tokenizer.ggml.token_type``: ordinary, unknown, special, added, padding, one byte."""
PREFIX, CHAT = "tokenizer.ggml.", "tokenizer.chat_template"
SPACE = "\u2581"
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # GGUF spells it so
    "pad_token": "padding_token_id",
}


class _Vocabulary:
    """The metadata, checked: lists of equal lengths, and ids that are tokens."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.values = {
            key.removeprefix(PREFIX): value
            for key, value in metadata.items()
            if key.startswith(PREFIX)
        }
        self.model: object = self.values.get("model")
        self.tokens = self._list("tokens", str)
        n = len(self.tokens)
        self.types = self._list("token_type", int) if "token_type" in self.values else [NORMAL] * n
        if not n or len(self.types) != n:
            raise UsageError(
                f"{foreign(path)} has {n:,} tokens and {len(self.types):,} types of tokens, and "
                "must have one type for each of one or more tokens"
            )
        own = [i for i, kind in enumerate(self.types) if kind != UNUSED]
        self.vocab = {self.tokens[i]: i for i in own}
        if len(self.vocab) < len(own):
            raise UsageError(f"{foreign(path)} has the same token twice in tokenizer.ggml.tokens")
        self.special = self._of(CONTROL, UNKNOWN)
        self.added = self._of(USER)
        ids = {name: self._id(key) for name, key in NAMES.items()}
        named = {name: self.tokens[i] for name, i in ids.items() if i is not None}
        self.settings = Settings(tokens=named, chat=_chat(path, metadata, named))
        ends = (self._id(key) for key in ENDS)
        usual = self.special.get(END_OF_TEXT)
        self.ends = [i for i in dict.fromkeys((*ends, usual)) if i is not None]
        self.special |= {self.tokens[i]: i for i in self.ends if i not in self.added.values()}

    def first(self, default: bool) -> tuple[int, ...]:
        """The ids that begin a text."""
        if self.flag("add_eos_token", False):
            raise UsageError(f"{foreign(self.path)} has add_eos_token true, and must have false")
        bos = self._id("bos_token_id")
        return (bos,) if bos is not None and self.flag("add_bos_token", default) else ()

    def flag(self, name: str, default: bool) -> bool:
        """A value that is true or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise UsageError(
                f"{foreign(self.path)} has {PREFIX}{name} {quoted(value)}, which must be true or "
                "false"
            )
        return value

    def scores(self) -> list[float]:
        """A score for each token."""
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise UsageError(f"{foreign(self.path)} must have a score for each token")
        return scores

    def _of(self, *kinds: int) -> dict[str, int]:
        return {t: i for t, i in self.vocab.items() if self.types[i] in kinds}

    def _list(self, name: str, kind: type) -> list[Any]:
        value: Any = self.values.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise UsageError(
                f"{foreign(self.path)} has {PREFIX}{name} {quoted(value)}, which must be a list "
                f"of {kind.__name__}"
            )
        return value

    def _id(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise UsageError(
                f"{foreign(self.path)} has {PREFIX}{name} {quoted(value)}, which must be the id "
                "of a token"
            )
        return value


def tokenizer_of(path: Path, metadata: Mapping[str, Any], *, rows: int) -> Tokenizer:
    """The tokenizer in the ``metadata`` of the GGUF file at ``path``, for a model of ``rows`` rows.

    The values are Python's: numbers, texts, and lists of them (or arrays with ``tolist``).
    ``UsageError`` for metadata that is broken, and for an unknown ``tokenizer.ggml.model`` or
    ``pre``.
    """
    theirs = _Vocabulary(path, metadata)
    match theirs.model:
        case "gpt2":
            return _byte_level(path, theirs, rows)
        case "llama":
            return _sentencepiece(path, theirs, rows)
    raise UsageError(
        f"{foreign(path)} has tokenizer.ggml.model {quoted(theirs.model)}, and must have gpt2 or "
        "llama"
    )


def _byte_level(path: Path, theirs: _Vocabulary, rows: int) -> Tokenizer:
    with about(path):
        pattern = pattern_of_pre(theirs.values.get("pre"))
    known, pairs = KNOWN[pattern], pairs_of(path, theirs.values.get("merges"))
    first = theirs.first(known.adds_first)
    special = theirs.special | {theirs.tokens[i]: i for i in first}
    try:
        return byte_pair(
            path,
            theirs.vocab,
            pairs,
            special=special,
            added=theirs.added,
            end_of_text=theirs.ends,
            rows=rows,
            settings=theirs.settings,
            first=first,
            pattern=pattern,
            normalisation=known.normalisation,
        )
    except OtherEngineError:
        pass
    apart = special | theirs.added
    definition = byte_level_definition(
        {token: i for token, i in theirs.vocab.items() if token not in apart},
        pairs,
        added_tokens=added_entries(special, theirs.added),
        before=steps_of(pattern),
        ignore_merges=known.ignore_merges,
        normalizer={"type": known.normalisation} if known.normalisation else None,
    )
    return _library(path, definition, theirs, rows, first)


def _sentencepiece(path: Path, theirs: _Vocabulary, rows: int) -> Tokenizer:
    scores, vocab = theirs.scores(), theirs.vocab
    apart = theirs.special | theirs.added
    pieces = [token for token in vocab if token not in apart and theirs.types[vocab[token]] != BYTE]
    known = set(pieces)
    merges: list[tuple[float, str, str]] = []
    for piece in pieces:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = sorted(
            (pair for pair in splits if known.issuperset(pair)),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
        merges += [(scores[vocab[piece]], *pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])  # stable
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}]
    after: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if not theirs.flag("add_space_prefix", True):
        before = after = []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    definition = byte_level_definition(
        vocab,
        [[a, b] for _, a, b in merges],
        added_tokens=added_entries(theirs.special, theirs.added),
        before=None,
        decoder={
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
        normalizer={"type": "Sequence", "normalizers": [*before, space]},
    )
    unknown = next((token for token, i in vocab.items() if theirs.types[i] == UNKNOWN), None)
    definition["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return _library(path, definition, theirs, rows, theirs.first(True))


def _library(
    path: Path,
    definition: dict[str, Any],
    theirs: _Vocabulary,
    rows: int,
    first: tuple[int, ...],
) -> Tokenizer:
    return library_tokenizer(
        path,
        definition,
        end_of_text=theirs.ends,
        rows=rows,
        settings=theirs.settings,
        first=first,
    )


def _chat(
    path: Path, metadata: Mapping[str, Any], tokens: Mapping[str, str]
) -> ChatTemplates | None:
    """``tokenizer.chat_template``, and ``tokenizer.chat_template.NAME`` for further ones."""
    templates = {
        key.removeprefix(CHAT).removeprefix(".") or DEFAULT: value
        for key, value in metadata.items()
        if key == CHAT or key.startswith(CHAT + ".")
    }
    if not all(isinstance(template, str) for template in templates.values()):
        raise UsageError(f"{foreign(path)} has a {CHAT} that is not a text")
    return chat_of(templates, tokens)
