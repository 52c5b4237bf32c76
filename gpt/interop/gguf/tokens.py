"""The tokenizer of a GGUF file: its metadata as checked Python values, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config import UsageError, quoted
from gpt.data.tokenizer import GPT2Tokenizer, Tokenizer
from gpt.interop.vocabulary import _make, _merged_from, byte_characters

PREFIX = "tokenizer.ggml."
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
"""``token_type``: ordinary, special, added, and padding."""


class _Metadata:
    """The metadata of a tokenizer, with checks."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.theirs = {k.removeprefix(PREFIX): v for k, v in given.items() if k.startswith(PREFIX)}

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value of a ``kind``; a ``default`` of ``...`` means that it is needed."""
        value = self.theirs.get(key, default)
        if value is ...:
            raise UsageError(f"it lacks the metadata {PREFIX}{key}")
        if value is not default and type(value) is not kind:
            raise UsageError(f"{PREFIX}{key} is {quoted(value)}, and must be a {kind.__name__}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self.get(key, list, ...)
        return value if isinstance(value, list) else []

    def numbers(self, key: str, n: int) -> list[Any] | None:
        """An array of ``n`` numbers; ``None`` if there is none."""
        value = self.theirs.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != n:
            raise UsageError(f"{PREFIX}{key} must be a list of {n:,} numbers, one for each token")
        found: list[Any] = value.tolist()
        return found

    def id(self, key: str, n: int) -> int | None:
        """The id of one of ``n`` tokens; ``None`` if there is none."""
        value: int | None = self.get(key, int, None)
        if value is not None and not 0 <= value < n:
            raise UsageError(f"{PREFIX}{key} is {value:,}, and the vocabulary has {n:,} tokens")
        return value


def tokenizer_of(path: Path, metadata: Mapping[str, Any], *, rows: int) -> Tokenizer:
    """The tokenizer."""
    read = _Metadata(metadata)
    tokens = read.texts("tokens")
    n = len(tokens)
    if n != rows:
        raise UsageError(f"{PREFIX}tokens has {n:,} tokens, and token_embd.weight {rows:,} rows")
    types = read.numbers("token_type", n) or [NORMAL] * n
    pairs = [(a, b) for a, _, b in (merge.partition(" ") for merge in read.texts("merges"))]
    ids = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    special = {t: i for t, i in ids.items() if types[i] == CONTROL}
    added = {t: i for t, i in ids.items() if types[i] == USER}
    end = [i for i in (read.id(f"{k}_token_id", n) for k in ("eos", "eot")) if i is not None]
    return _make(path, ids, pairs, special=special, added=added, end_of_text=end, rows=rows)


def tokenizer_metadata(tokenizer: Tokenizer, *, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer, with unused tokens up to the model's ``rows``."""
    characters = byte_characters()
    assert isinstance(tokenizer, GPT2Tokenizer)
    tokens = ["".join(characters[b] for b in token) for token in tokenizer.ranks]
    vocab = {token: i for i, token in enumerate(tokens, tokenizer.first_id)}
    named = dict(enumerate(tokens, tokenizer.first_id))
    types = dict.fromkeys(named, NORMAL)
    for group, kind in ((tokenizer.special, CONTROL), (tokenizer.added, USER)):
        for token, i in group.items():
            named[i], types[i] = token, kind
    for i in range(rows):
        if i not in named:
            named[i], types[i] = f"[PAD{i}]", UNUSED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [named[i] for i in range(rows)],
        "tokenizer.ggml.token_type": [types[i] for i in range(rows)],
        "tokenizer.ggml.merges": [" ".join(_merged_from(t, vocab)) for t in tokens[256:]],
        "tokenizer.ggml.bos_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
