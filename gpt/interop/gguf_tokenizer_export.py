"""Write a tokenizer as the metadata of a GGUF file, as :mod:`gpt.interop.gguf_tokenizer` reads it.

Characters become a vocabulary of SentencePiece in which nothing can be merged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt.config import UsageError, quoted
from gpt.data.byte_pair import GPT2Tokenizer
from gpt.data.chat_templates import DEFAULT
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, ends_of, special_tokens
from gpt.interop.gguf_tokenizer import (
    BYTE,
    CHAT,
    CONTROL,
    ENDS,
    NAMES,
    NORMAL,
    PREFIX,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER,
)
from gpt.interop.patterns import KNOWN, pattern_of_steps
from gpt.interop.vocabulary_export import definition_of


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
    metadata |= dict(zip(ENDS, ends, strict=False))
    named_tokens = tokenizer.chat.tokens if tokenizer.chat else {}
    metadata |= {
        NAMES[name]: special[text]
        for name, text in named_tokens.items()
        if name in NAMES and text in special
    }
    if written.scores is not None:
        metadata["scores"] = [written.scores.get(i, 0.0) for i in range(rows)]
    result = {f"{PREFIX}{key}": value for key, value in metadata.items()}
    if tokenizer.chat:
        for name, template in tokenizer.chat.templates.items():
            result[CHAT if name == DEFAULT else f"{CHAT}.{name}"] = template
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
    if SPACE in tokenizer.characters:
        raise UsageError(
            f"the tokenizer has the character {SPACE!r}, which stands for a space in GGUF"
        )
    named = {i: c.replace(" ", SPACE) for i, c in enumerate(tokenizer.characters)}
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
