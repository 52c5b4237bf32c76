"""A tokenizer as the metadata of a GGUF file (``tokenizer.ggml.*``), in and out.

The model ``gpt2`` is a byte-level vocabulary with merges, whose pattern ``pre`` names. The model
``llama`` is one of SentencePiece's: the pair of neighbours whose token has the highest score is
merged first, and characters that are not tokens become bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_pair import END_OF_TEXT, GPT2Tokenizer
from gpt.data.chat_templates import DEFAULT, ChatTemplates
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.data.patterns import steps_of
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, ends_of, special_tokens
from gpt.interop.patterns import KNOWN, pattern_of_pre, pattern_of_steps
from gpt.interop.tokenizer_settings import Settings
from gpt.interop.vocabulary import (
    OtherEngineError,
    added_entries,
    byte_level_definition,
    byte_pair,
    library_tokenizer,
    pairs_of,
)
from gpt.interop.vocabulary_export import definition_of

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""``tokenizer.ggml.token_type``: ordinary, unknown, special, added, padding, one byte."""
_PREFIX, _CHAT = "tokenizer.ggml.", "tokenizer.chat_template"
_SPACE = "\u2581"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NAMES = {
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
            key.removeprefix(_PREFIX): value
            for key, value in metadata.items()
            if key.startswith(_PREFIX)
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
        ids = {name: self._id(key) for name, key in _NAMES.items()}
        named = {name: self.tokens[i] for name, i in ids.items() if i is not None}
        self.settings = Settings(tokens=named, chat=_chat(path, metadata, named))
        ends = (self._id(key) for key in _ENDS)
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
                f"{foreign(self.path)} has {_PREFIX}{name} {quoted(value)}, which must be true or "
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
                f"{foreign(self.path)} has {_PREFIX}{name} {quoted(value)}, which must be a list "
                f"of {kind.__name__}"
            )
        return value

    def _id(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise UsageError(
                f"{foreign(self.path)} has {_PREFIX}{name} {quoted(value)}, which must be the id "
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
    try:
        pattern = pattern_of_pre(theirs.values.get("pre"))
    except UsageError as error:
        raise UsageError(f"{foreign(path)}: {error}") from None
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
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}]
    after: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if not theirs.flag("add_space_prefix", True):
        before = after = []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
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
        key.removeprefix(_CHAT).removeprefix(".") or DEFAULT: value
        for key, value in metadata.items()
        if key == _CHAT or key.startswith(_CHAT + ".")
    }
    if not all(isinstance(template, str) for template in templates.values()):
        raise UsageError(f"{foreign(path)} has a {_CHAT} that is not a text")
    return ChatTemplates(templates, tokens) if templates else None


def tokenizer_metadata(tokenizer: Tokenizer, *, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer, with unused tokens up to the model's ``rows``.

    ``UsageError`` for a tokenizer that llama.cpp cannot express.
    """
    special = special_tokens(tokenizer)
    added: Mapping[str, int] = getattr(tokenizer, "added", {})
    if type(tokenizer) not in _WRITERS:
        raise UsageError(f"a {tokenizer.kind} tokenizer cannot be written to a GGUF file")
    written = _WRITERS[type(tokenizer)](tokenizer)
    named, types = dict(written.tokens), dict.fromkeys(written.tokens, NORMAL) | written.types
    for group, kind in ((special, CONTROL), (added, USER)):
        for token, i in group.items():
            named[i], types[i] = token, kind
    metadata = written.metadata
    if written.unknown is not None:
        types[written.unknown] = UNKNOWN
        metadata |= {"unknown_token_id": written.unknown}
    for i in range(rows):
        if i not in named:
            named[i], types[i] = f"[PAD{i}]", UNUSED
    first = tokenizer.first[0] if tokenizer.first else tokenizer.end_of_text
    ends = [tokenizer.end_of_text, *sorted(ends_of(tokenizer) - {tokenizer.end_of_text})]
    metadata |= {
        "tokens": [named[i] for i in range(rows)],
        "token_type": [types[i] for i in range(rows)],
        "bos_token_id": first,
        "add_bos_token": bool(tokenizer.first),
    }
    metadata |= dict(zip(_ENDS, ends, strict=False))
    named_tokens = tokenizer.chat.tokens if tokenizer.chat else {}
    metadata |= {
        _NAMES[name]: special[text]
        for name, text in named_tokens.items()
        if name in _NAMES and text in special
    }
    if written.scores is not None:
        metadata["scores"] = [written.scores.get(i, 0.0) for i in range(rows)]
    result = {f"{_PREFIX}{key}": value for key, value in metadata.items()}
    if tokenizer.chat:
        for name, template in tokenizer.chat.templates.items():
            result[_CHAT if name == DEFAULT else f"{_CHAT}.{name}"] = template
    return result


@dataclass
class _Written:
    """A vocabulary in GGUF's terms, without its special and added tokens."""

    tokens: dict[int, str]
    metadata: dict[str, Any]
    types: dict[int, int] = field(default_factory=dict)
    """The types of tokens that are not ordinary."""
    scores: dict[int, float] | None = None
    unknown: int | None = None


def _written_byte_level(tokenizer: Tokenizer) -> _Written:
    """A byte-level vocabulary."""
    definition = definition_of(tokenizer)
    model, before = definition["model"], definition["pre_tokenizer"]
    pattern = getattr(tokenizer, "pattern", None) or pattern_of_steps(
        before, ignore_merges=model["ignore_merges"]
    )
    if pattern is None or not KNOWN[pattern].pre:
        raise UsageError(
            f"the tokenizer splits a text with {quoted(pattern or before)}, which has no name in "
            f"GGUF; the patterns that have one are {', '.join(p for p in KNOWN if KNOWN[p].pre)}"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    metadata = {"model": "gpt2", "pre": KNOWN[pattern].pre[0], "merges": merges}
    return _Written(
        {i: token for token, i in model["vocab"].items()},
        metadata | {"add_space_prefix": False},
    )


def _written_characters(tokenizer: Tokenizer) -> _Written:
    """Characters as a vocabulary of SentencePiece in which nothing can be merged."""
    assert isinstance(tokenizer, CharTokenizer)
    if _SPACE in tokenizer.characters:
        raise UsageError(
            f"the tokenizer has the character {_SPACE!r}, which stands for a space in GGUF"
        )
    named = {i: c.replace(" ", _SPACE) for i, c in enumerate(tokenizer.characters)}
    metadata = {"model": "llama", "pre": "default", "add_space_prefix": False}
    scores = dict.fromkeys(named, 0.0)
    return _Written(named, metadata, scores=scores, unknown=tokenizer.unknown)


def _written_library(tokenizer: Tokenizer) -> _Written:
    """A vocabulary of SentencePiece with the ranks of its merges as scores, or a byte-level one."""
    assert isinstance(tokenizer, LibraryTokenizer)
    model = tokenizer.definition["model"]
    if not model.get("byte_fallback"):
        return _written_byte_level(tokenizer)
    named = {i: token for token, i in model["vocab"].items()}
    scores: dict[int, float] = {}
    for rank, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(model["vocab"][a + b], -float(rank))
    lowest = -float(len(model["merges"]))
    is_byte = {i for i, token in named.items() if len(token) == 6 and token.startswith("<0x")}
    metadata = {"model": "llama", "pre": "default", "add_space_prefix": tokenizer.opens_with_space}
    return _Written(
        named,
        metadata,
        types=dict.fromkeys(is_byte, BYTE),
        scores={i: scores.get(i, lowest) for i in named},
        unknown=model["vocab"].get(model.get("unk_token")),
    )


_WRITERS: dict[type, Callable[[Tokenizer], _Written]] = {
    GPT2Tokenizer: _written_byte_level,
    ByteTokenizer: _written_byte_level,
    CharTokenizer: _written_characters,
    LibraryTokenizer: _written_library,
}
