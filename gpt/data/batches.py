"""Batches as a function of (seed, step): the same on one process or on eight, before and after a
resume.

The tokens are cut into windows of ``context_length``. Each epoch is a permutation of them, drawn
from (seed, epoch): every window once, without replacement. Step ``s`` takes the next ``batch_size``
windows of that endless sequence, so the position in the data is a function of the step alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import UsageError
from gpt.data.shards import Shard

IGNORED = -100
"""A target that is not to be learned."""


@dataclass(frozen=True)
class Batch:
    """``tokens`` and, one place on, ``targets``: both ``[B, T]`` of int64."""

    tokens: Tensor
    targets: Tensor

    def n_targets(self) -> int:
        """Targets that are to be learned."""
        return int((self.targets != IGNORED).sum())

    def split(self, size: int) -> "Iterator[Batch]":
        """Batches of ``size`` sequences; the last may have fewer."""
        return map(Batch, self.tokens.split(size), self.targets.split(size))

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``; a copy to CUDA does not wait for it."""
        if device.type != "cuda":
            return Batch(self.tokens.to(device), self.targets.to(device))
        # One contiguous tensor: a view that has gaps would go through memory that is not pinned.
        both = torch.stack([self.tokens, self.targets]).pin_memory()  # 2, B, T
        return Batch(*both.to(device, non_blocking=True))


class Windows:
    """A shard as windows of ``context_length`` tokens, each with the token that follows it."""

    def __init__(self, shard: Shard, context_length: int) -> None:
        if len(shard) <= context_length:
            raise UsageError(
                f"{shard.path} has {len(shard):,} tokens, and one window of model.context_length "
                f"{context_length} needs {context_length + 1:,}: give a longer text, a shorter "
                "context, or another data.validation_fraction"
            )
        self.ids = shard.ids
        self.context_length = context_length

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.context_length

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """The windows of those numbers, ``[B]``, as a batch."""
        T = self.context_length
        rows = np.stack([self.ids[w * T : w * T + T + 1] for w in windows]).astype(np.int64)
        both = torch.from_numpy(rows)
        return Batch(both[:, :-1], both[:, 1:])

    def spread(self, n: int) -> NDArray[np.int64]:
        """``n`` window numbers at even distances over the shard; all of them for 0 or too large an
        ``n``.
        """
        if not 0 < n < len(self):
            return np.arange(len(self))
        return np.arange(n) * len(self) // n


class Order:
    """Which windows each step takes."""

    def __init__(self, n_windows: int, *, batch_size: int, seed: int) -> None:
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.Philox((self.seed, epoch))).permutation(self.n_windows)

    def step(self, step: int) -> NDArray[np.int64]:
        """The windows of ``step`` (from 0), ``[batch_size]``: a step may end one epoch and begin
        the next.
        """
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, self.n_windows)
        return np.array([self._epoch(int(e))[w] for e, w in zip(epochs, within, strict=True)])
