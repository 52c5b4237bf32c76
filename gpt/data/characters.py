"""The plainest tokenizers: a token is a character of the text, or a byte."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gpt.config import UsageError, quoted
from gpt.data.byte_pair import END_OF_TEXT, Ids
from gpt.data.chat_templates import ChatTemplates
from gpt.data.words import UNKNOWN, UNKNOWN_BYTES


class CharTokenizer:
    """One token per character of the corpus, sorted by code point, end-of-text, and ``<UNK>`` for
    all other characters if ``unknown``.
    """

    kind = "char"
    first: tuple[int, ...] = ()
    chat: ChatTemplates | None = None

    def __init__(self, characters: Iterable[str], *, unknown: bool = False) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.end_of_text = len(self.characters)
        self.special = {END_OF_TEXT: self.end_of_text}
        if unknown:
            self.special[UNKNOWN] = self.end_of_text + 1
        self.unknown = self.special.get(UNKNOWN)
        self.vocab_size = len(self.characters) + len(self.special)
        codes = self._codes(self.characters)
        self._table = np.full(int(codes.max(initial=0)) + 1, self.vocab_size, np.uint32)
        self._table[codes] = np.arange(len(codes), dtype=np.uint32)
        self._bytes = [*(character.encode() for character in self.characters), b"", UNKNOWN_BYTES]

    @staticmethod
    def _codes(text: str) -> Ids:
        return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)

    def encode(self, text: str) -> Ids:
        """One id per character; ``UsageError`` names a character that is not in the vocabulary."""
        codes = self._codes(text)
        known = codes < len(self._table)
        ids: Ids = self._table[np.where(known, codes, 0)]
        unknown = ~known | (ids == self.vocab_size)
        if self.unknown is not None:
            return np.where(unknown, np.uint32(self.unknown), ids)
        if unknown.any():
            character = text[int(unknown.argmax())]
            raise UsageError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the tokenizer's "
                f"vocabulary of {len(self.characters)} characters; the byte and gpt2 tokenizers "
                "accept every character"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids])

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"characters": self.characters}
        return state if self.unknown is None else state | {"unknown": True}


class ByteTokenizer:
    """One token per byte of the text's UTF-8, and end-of-text."""

    kind = "byte"
    first: tuple[int, ...] = ()
    chat: ChatTemplates | None = None
    end_of_text = 256
    vocab_size = 257

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes([i for i in ids if i != self.end_of_text])

    def state(self) -> dict[str, Any]:
        return {}


def characters_from_state(state: dict[str, Any]) -> CharTokenizer:
    """The tokenizer of a saved ``state``; ``ValueError`` says what is wrong with it."""
    characters, unknown = state.get("characters"), state.get("unknown", False)
    if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
        raise ValueError("characters must be sorted by code point, without repetition")
    if not isinstance(unknown, bool):
        raise ValueError(f"unknown is {quoted(unknown)}, and must be true or false")
    return CharTokenizer(characters, unknown=unknown)
