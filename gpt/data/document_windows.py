"""Whole documents in windows (``data.windows`` is ``best_fit``): best-fit decreasing bin packing,
which cuts only the documents that are longer than a window (Ding et al., 2024, "Fewer Truncations
Improve Language Modeling", arXiv:2404.10830).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.config import UsageError, foreign
from gpt.data.batches import IGNORED, Batch, Boundary, spread
from gpt.data.packing import pack
from gpt.data.shards import Shard, Shards


class DocumentWindows:
    """A shard's documents in windows of ``context_length`` positions, attention inside each.

    A document that is too long is cut into windows of its own and a rest. The place behind the last
    document of a window has no targets. The plan takes about 26 bytes a document (200 while it is
    made), and depends on the shard alone.
    """

    def __init__(self, shard: Shard | Shards, context_length: int, boundary: Boundary) -> None:
        self.shard, self.context_length, self.boundary = shard, context_length, boundary
        starts, sizes = _documents(shard, boundary)
        if not len(sizes):
            raise UsageError(
                f"{foreign(shard.path)} has no document of two tokens, and needs one; use a longer "
                "text or another data.validation_fraction"
            )
        self.n_documents = len(sizes)
        self.n_cut = int((sizes > context_length).sum())
        """How many documents are longer than a window."""
        starts, sizes = _cut(starts, sizes, context_length)
        windows = pack(sizes, context_length)
        order = np.array([piece for window in windows for piece in window], np.int64)
        self._begins = np.cumsum([0, *map(len, windows)])
        self._starts, self._sizes = starts[order], sizes[order]
        self.fill = float(sizes.sum()) / (len(windows) * context_length)
        """The fraction of the positions that hold a document."""

    def __len__(self) -> int:
        return len(self._begins) - 1

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """The batch of the windows with these numbers ``[B]``."""
        shape = len(windows), self.context_length
        tokens = np.full(shape, self.boundary.end_of_text, np.int64)
        targets, documents = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
        for row, window in enumerate(windows.tolist()):
            at = 0
            for piece in range(self._begins[window], self._begins[window + 1]):
                n = int(self._sizes[piece])
                ids = self.shard.read(int(self._starts[piece]), n + 1)
                tokens[row, at : at + n], targets[row, at : at + n] = ids[:-1], ids[1:]
                documents[row, at : at + n] = piece
                at += n
        return Batch(*map(torch.from_numpy, (tokens, targets, documents)))

    def spread(self, n: int) -> NDArray[np.int64]:
        """``n`` window numbers, evenly spread; all windows if ``n`` is 0 or too large."""
        return spread(n, len(self))

    def describe(self) -> list[str]:
        """How the documents are packed, for the user."""
        return [
            f"packing  {self.n_documents:,} documents in {len(self):,} windows, {self.fill:.1%} "
            f"full; {self.n_cut:,} are longer than a window and cut"
        ]


def _documents(
    shard: Shard | Shards, boundary: Boundary
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first token of each document that has a target, and the number of its positions: each
    predicts the next token, and the last one the end of text.
    """
    ends = shard.documents(boundary.end_of_text)
    starts = np.concatenate([[0], ends if boundary.begins else ends + 1])
    stops = np.concatenate([ends, [len(shard) - 1]])  # the text may end inside a document
    sizes = stops - starts
    return starts[sizes > 0], sizes[sizes > 0]


def _cut(
    starts: NDArray[np.int64], sizes: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same positions in pieces of at most ``most``."""
    pieces = -(-sizes // most)
    of = np.repeat(np.arange(len(sizes)), pieces)
    inside = (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    return starts[of] + inside, np.minimum(sizes[of] - inside, most)
