"""What is in prepared tokens: counts, a histogram of lengths, frequent tokens, first documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt.data.shards import Shard, Shards
from gpt.data.tokenizer import Tokenizer, byte_lengths, decode

BLOCK = 1 << 22


@dataclass(frozen=True)
class Inspection:
    """The figures of one split."""

    path: Path
    files: int
    tokens: int
    documents: int
    bytes: int
    """Of the text of all tokens."""
    lengths: list[tuple[int, int]]
    """The number of documents by length: each entry has the most tokens, a power of two, and a
    count."""
    longest: int
    """Tokens of the longest document."""
    frequent: list[tuple[int, int]]
    """The most frequent ids, with their counts."""
    unused: int
    """Ids of the vocabulary that do not occur."""
    first: list[str]
    """The beginnings of the first documents."""


def inspect(
    data: Shard | Shards, tokenizer: Tokenizer, *, frequent: int, first: int, characters: int
) -> Inspection:
    """Read all ids of ``data`` once. ``first`` documents are decoded up to ``characters``."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(data), BLOCK):
        counts += np.bincount(data.read(start, BLOCK), minlength=len(counts))
    ends = data.documents(tokenizer.end_of_text)
    if not len(ends) or ends[-1] != len(data) - 1:  # the last document may be cut
        ends = np.append(ends, len(data))
    lengths = np.diff(ends, prepend=-1) - 1  # without end-of-text
    ends, lengths = ends[lengths > 0], lengths[lengths > 0]
    order = np.argsort(-counts, kind="stable")[:frequent]
    return Inspection(
        path=data.path,
        files=len(data.parts) if isinstance(data, Shards) else 1,
        tokens=len(data),
        documents=len(lengths),
        bytes=int(counts @ byte_lengths(tokenizer)),
        lengths=histogram(lengths),
        longest=int(lengths.max(initial=0)),
        frequent=[(int(i), int(counts[i])) for i in order if counts[i]],
        unused=int((counts == 0).sum()),
        first=_first(data, tokenizer, ends[:first], lengths[:first], characters),
    )


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """How many of ``lengths`` are at most 16, 32, 64, ..., and more than the number before."""
    if not len(lengths):
        return []
    bounds = 2 ** np.arange(4, max(5, int(lengths.max() - 1).bit_length() + 1))
    places = np.searchsorted(bounds, lengths)
    found = np.bincount(places, minlength=len(bounds))
    return [(int(bound), int(n)) for bound, n in zip(bounds, found, strict=True)]


def _first(
    data: Shard | Shards,
    tokenizer: Tokenizer,
    ends: NDArray[np.int64],
    lengths: Sequence[int] | NDArray[np.int64],
    characters: int,
) -> list[str]:
    texts = []
    for end, length in zip(ends.tolist(), lengths, strict=True):
        ids = data.read(end - int(length), min(int(length), 4 * characters))
        text = decode(tokenizer, ids.tolist())
        texts.append(text if len(text) <= characters else text[:characters] + "...")
    return texts
