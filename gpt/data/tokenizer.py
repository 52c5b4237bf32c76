"""Text to token ids and back: what all tokenizers have in common, and how they are saved.

A tokenizer is saved completely. Its JSON holds everything that encoding needs, so sampling needs
neither the corpus nor a network. Decoding goes through bytes, because a character may span several
tokens.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_pair import END_OF_TEXT as END_OF_TEXT
from gpt.data.byte_pair import GPT2Tokenizer as GPT2Tokenizer
from gpt.data.byte_pair import Ids as Ids
from gpt.data.byte_pair import byte_pair_from_state
from gpt.data.characters import ByteTokenizer as ByteTokenizer
from gpt.data.characters import CharTokenizer as CharTokenizer
from gpt.data.characters import characters_from_state
from gpt.data.chat_templates import ChatTemplates
from gpt.data.library_tokenizer import library_tokenizer_from_state
from gpt.data.sentencepiece_tokenizer import sentencepiece_from_state
from gpt.data.words import words_from_state
from gpt.files import read_json

GPT2_VOCAB_SIZE = 50257


class Tokenizer(Protocol):
    """The interface of all tokenizers. ``end_of_text`` ends each document, and begins an empty
    prompt.
    """

    kind: str
    vocab_size: int
    end_of_text: int
    first: tuple[int, ...]
    """The ids that begin every document and prompt, such as Llama's ``<s>``; mostly none."""
    chat: ChatTemplates | None
    """The model's chat templates, if it has some."""

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, ``[n]``. No part of it is read as a special token, and none is
        added.
        """

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of ``ids``; ``end_of_text`` has none."""

    def state(self) -> dict[str, Any]:
        """JSON values from which an equal tokenizer can be made."""


def to_json(tokenizer: Tokenizer) -> str:
    """The content of the file that :func:`load` reads."""
    state = {"kind": tokenizer.kind, **tokenizer.state()}
    if tokenizer.chat is not None:
        state["chat"] = tokenizer.chat.state()
    return json.dumps(state, ensure_ascii=True) + "\n"


def load(path: Path) -> Tokenizer:
    """The tokenizer saved at ``path``; ``UsageError`` if it does not exist or is broken."""
    state = read_json(path, "the tokenizer")
    try:
        return _from_state(state)
    except ValueError as error:
        raise UsageError(f"the tokenizer {foreign(path)} is broken: {foreign(error)}") from None


def _from_state(state: Any) -> Tokenizer:
    """The tokenizer of a ``state``; ``ValueError`` says what is wrong with it."""
    if not isinstance(state, dict):
        raise ValueError("it must be an object")
    tokenizer = _without_chat(state)
    tokenizer.chat = ChatTemplates.from_state(state.get("chat"))
    return tokenizer


def _without_chat(state: dict[str, Any]) -> Tokenizer:
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {quoted(kind)}, and must be one of {', '.join(KINDS)}")
    return KINDS[kind](state)


KINDS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
    "char": characters_from_state,
    "byte": lambda state: ByteTokenizer(),
    "words": words_from_state,
    "gpt2": byte_pair_from_state,
    "tokenizers": library_tokenizer_from_state,
    "sentencepiece": sentencepiece_from_state,
}
"""From the kind in a file to what reads the rest. ``gpt2`` are all byte pairs that tiktoken
computes.
"""


def name_of(tokenizer: Tokenizer) -> str:
    """What messages call a tokenizer."""
    size = GPT2_VOCAB_SIZE if tokenizer.kind == "gpt2" else tokenizer.vocab_size
    return tokenizer.kind if tokenizer.vocab_size == size else "byte-pair"


def special_tokens(tokenizer: Tokenizer) -> Mapping[str, int]:
    """The special tokens by their texts; end-of-text for a tokenizer that has no texts for them."""
    named: Mapping[str, int] = getattr(tokenizer, "special", {END_OF_TEXT: tokenizer.end_of_text})
    return named


def encode_special(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids of ``text``, in which the texts of special tokens are these tokens. For texts that
    the user trusts: :meth:`Tokenizer.encode` reads them as ordinary text.
    """
    special = special_tokens(tokenizer)
    longest_first = sorted(special, key=len, reverse=True)
    parts: list[Ids] = []
    for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", text)):
        if i % 2:
            parts.append(np.array([special[part]], np.uint32))
        elif part:
            parts.append(encoder(tokenizer, begins=i == 0)(part))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def fingerprint(tokenizer: Tokenizer) -> bytes:
    """SHA-256 of the tokenizer's state: equal exactly for tokenizers that encode alike."""
    state = {"kind": tokenizer.kind, **tokenizer.state()}
    state.pop("ends", None)
    return hashlib.sha256(f"{json.dumps(state)}\n".encode()).digest()


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a generated text."""
    ends: frozenset[int] = getattr(tokenizer, "ends", frozenset())
    return ends | {tokenizer.end_of_text}


def end_text(tokenizer: Tokenizer) -> str:
    """The text of the end-of-text token."""
    return next(t for t, i in special_tokens(tokenizer).items() if i == tokenizer.end_of_text)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins a document: ``first``, then the text's. For an empty text
    without ``first``, it is the end-of-text token that separates documents.
    """
    ids = [*tokenizer.first, *tokenizer.encode(text).tolist()]
    return ids or [tokenizer.end_of_text]


def encoder(tokenizer: Tokenizer, *, begins: bool) -> Callable[[str], Ids]:
    """What encodes a piece of a document: its beginning, with ``first``, or a later piece, before
    which a vocabulary of SentencePiece puts no space.
    """
    if not begins:
        later: Callable[[str], Ids] = getattr(tokenizer, "encode_next", tokenizer.encode)
        return later
    if not tokenizer.first:
        return tokenizer.encode
    first = np.array(tokenizer.first, np.uint32)
    return lambda text: np.concatenate([first, tokenizer.encode(text)])


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The ids of each text as a whole document: ``first``, the text's, and end-of-text."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return tokenizer.encode_documents(texts)
    end = np.array([tokenizer.end_of_text], np.uint32)
    return [np.concatenate([encoder(tokenizer, begins=True)(text), end]) for text in texts]


def opening_space(tokenizer: Tokenizer) -> bytes:
    """What the bytes of a whole text begin with that is not part of the text: the space that a
    vocabulary of SentencePiece puts before it, or nothing.
    """
    return b" " if getattr(tokenizer, "opens_with_space", False) else b""


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ``ids``, which begin a text; invalid UTF-8 becomes U+FFFD."""
    content = tokenizer.decode_bytes(ids).removeprefix(opening_space(tokenizer))
    return content.decode(errors="replace")


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The number of bytes of text of each id, ``[vocab_size]``."""
    return np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
