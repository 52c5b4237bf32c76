"""Examples packed into windows, as batches: attention stays inside each example."""

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.config import TooLong, UsageError
from gpt.data.batches import IGNORED, Batch, spread
from gpt.data.examples import Examples
from gpt.data.packing import pack


class ExampleWindows:
    """Windows of ``context_length`` positions. An example of ``n`` tokens needs ``n - 1`` of them.

    An example that is too long is cut, or dropped (``too_long``). One without an answer in what is
    left is dropped.
    """

    def __init__(self, examples: Examples, context_length: int, *, too_long: TooLong) -> None:
        self.examples, self.context_length = examples, context_length
        starts = np.concatenate([[0], examples.ends[:-1]])
        whole = examples.ends - starts - 1
        kept = np.minimum(whole, context_length)
        counted = np.concatenate([[0], np.cumsum(examples.counted)])
        targets = counted[starts + 1 + kept] - counted[starts + 1]
        usable = (targets > 0) & ((kept == whole) | (too_long == "cut"))
        if not usable.any():
            raise UsageError(
                f"{examples.path} has no example with an answer within model.context_length "
                f"{context_length}; use a larger one"
            )
        self._numbers = np.flatnonzero(usable)
        self._starts, self._kept = starts[self._numbers], kept[self._numbers]
        self._windows = pack(self._kept, context_length)
        self.cut = int((usable & (kept < whole)).sum())
        """How many examples are cut."""
        self.dropped = int((~usable).sum())
        """How many examples are left out."""
        used = int(self._kept.sum())
        self.fill = used / (len(self._windows) * context_length)
        """The fraction of the positions that hold an example."""
        self.counted = int(targets[self._numbers].sum()) / used
        """The fraction of these that have a target which counts in the loss."""

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """The batch of the windows with these numbers ``[B]``. What is behind the last example of a
        window has no targets.
        """
        shape = len(windows), self.context_length
        tokens = np.zeros(shape, np.int64)
        targets, documents = np.full(shape, IGNORED), np.zeros(shape, np.int64)
        for row, window in enumerate(windows.tolist()):
            at = 0
            for number, i in enumerate(self._windows[window]):
                start, n = self._starts[i], self._kept[i]
                ids = self.examples.ids[start : start + n + 1].astype(np.int64)
                counts = self.examples.counted[start + 1 : start + n + 1]
                tokens[row, at : at + n] = ids[:-1]
                targets[row, at : at + n] = np.where(counts, ids[1:], IGNORED)
                documents[row, at : at + n] = number
                at += n
            documents[row, at:] = len(self._windows[window])
        return Batch(*map(torch.from_numpy, (tokens, targets, documents)))

    def spread(self, n: int) -> NDArray[np.int64]:
        """``n`` window numbers, evenly spread; all windows if ``n`` is 0 or too large."""
        return spread(n, len(self))

    def describe(self) -> list[str]:
        """How the examples are packed, for the user."""
        n = len(self._numbers)
        left_out = "".join(
            f", {count:,} {what}"
            for count, what in ((self.cut, "cut"), (self.dropped, "left out"))
            if count
        )
        return [
            f"packing  {n:,} examples in {len(self):,} windows, {self.fill:.1%} full; "
            f"{self.counted:.1%} of the targets count{left_out}"
        ]
