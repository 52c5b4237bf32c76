"""Words as tokens, for sequences that are no language: codons of DNA, moves of a game, notes.

A text is cut into words and white space: each run of characters that are not white space is a word,
and has the space before it as its first character, if there is one. All other white space is one
token a character. So the tokens of a text, joined, are the text.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError, quoted
from gpt.data.byte_pair import END_OF_TEXT
from gpt.data.chat_templates import ChatTemplates

Ids = NDArray[np.uint32]
UNKNOWN = "<UNK>"
UNKNOWN_BYTES = "\ufffd".encode()
"""How an unknown word or character is shown: U+FFFD is Unicode's replacement character."""
MOST_WORDS = 5_000_000
"""A text with more distinct words is not one for a tokenizer of words; they would fill memory."""
_WORD = re.compile(r" ?\S+|\s")


class WordTokenizer:
    """One token a word of ``words``, then end-of-text, and ``<UNK>`` if ``unknown``.

    A word that is not in the vocabulary with the space before it becomes a space and the word
    alone. A word that is not in it either is ``<UNK>``, or is refused without ``unknown``.
    """

    kind = "words"
    first: tuple[int, ...] = ()
    chat: ChatTemplates | None = None

    def __init__(self, words: Sequence[str], *, unknown: bool = False) -> None:
        self.words = list(words)
        self.end_of_text = len(self.words)
        self.special = {END_OF_TEXT: self.end_of_text}
        if unknown:
            self.special[UNKNOWN] = self.end_of_text + 1
        self.unknown = self.special.get(UNKNOWN)
        self.vocab_size = len(self.words) + len(self.special)
        self._ids = {word: i for i, word in enumerate(self.words)}
        self._bytes = [*(word.encode() for word in self.words), b"", UNKNOWN_BYTES]

    def encode(self, text: str) -> Ids:
        """One or two ids a word; ``UsageError`` names a word that is not in the vocabulary."""
        ids: list[int] = []
        for word in _WORD.findall(text):
            known = self._ids.get(word)
            if known is not None:
                ids.append(known)
            else:
                ids += self._other(word)
        return np.array(ids, np.uint32)

    def _other(self, word: str) -> list[int]:
        parts = [" ", word[1:]] if word[0] == " " and len(word) > 1 else [word]
        ids = [self._ids.get(part, self.unknown) for part in parts]
        if None in ids:
            unknown = parts[-1] if ids[-1] is None else word
            raise UsageError(
                f"the word {quoted(unknown)} is not in the tokenizer's vocabulary of "
                f"{len(self.words):,} words; train it with unknown to read it as {UNKNOWN}"
            )
        return [i for i in ids if i is not None]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids])

    def state(self) -> dict[str, Any]:
        return {"words": self.words} | ({"unknown": True} if self.unknown is not None else {})


def words_from_state(state: dict[str, Any]) -> WordTokenizer:
    """The tokenizer of a saved ``state``; ``ValueError`` says what is wrong with it."""
    words, unknown = state.get("words"), state.get("unknown", False)
    if not isinstance(words, list) or not all(
        isinstance(word, str) and _WORD.fullmatch(word) for word in words
    ):
        raise ValueError("words must be a list of words, each with at most a space before it")
    if len(set(words)) < len(words):
        raise ValueError("words has the same word twice")
    if not isinstance(unknown, bool):
        raise ValueError(f"unknown is {quoted(unknown)}, and must be true or false")
    return WordTokenizer(words, unknown=unknown)


def train_words(pieces: Iterable[str], *, vocab_size: int = 0, unknown: bool) -> WordTokenizer:
    """A tokenizer of the most frequent words of a text, ``vocab_size`` tokens with the special ones
    (0: all words). ``UsageError`` if words are left over and ``unknown`` is not set.
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(_WORD.findall(piece))
        if len(counts) > MOST_WORDS:
            raise UsageError(
                f"the text has more than {MOST_WORDS:,} distinct words, too many for the words "
                "tokenizer; bpe has no such limit"
            )
    if unknown:  # stands before an unknown word
        counts[" "] += 1 << 62
    room = vocab_size - 1 - unknown if vocab_size else len(counts)
    if len(counts) > room and not unknown:
        raise UsageError(
            f"the text has {len(counts):,} distinct words, and vocab_size is {vocab_size:,} with "
            f"end-of-text; give at least {len(counts) + 1:,}, or set unknown to read the rarest "
            f"ones as {UNKNOWN}"
        )
    return WordTokenizer(_most_frequent(counts, room), unknown=unknown)


def train_characters(pieces: Iterable[str], *, vocab_size: int = 0) -> str:
    """The most frequent characters of a text, ``vocab_size`` tokens with end-of-text and ``<UNK>``
    (0: all characters).
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
        found, times = np.unique(codes, return_counts=True)
        counts.update(dict(zip(map(chr, found.tolist()), times.tolist(), strict=True)))
    return "".join(_most_frequent(counts, vocab_size - 2 if vocab_size else len(counts)))


def _most_frequent(counts: Counter[str], n: int) -> list[str]:
    """The ``n`` most frequent entries, of equally frequent ones the first by code points."""
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[: max(n, 0)]
