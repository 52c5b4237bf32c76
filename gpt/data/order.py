"""Which windows each step takes, as a function of (seed, step).

Each epoch takes every window once, in an order drawn from (seed, epoch). The epochs form one
endless sequence, and each step takes the next ``batch_size`` windows of it. So the windows of a
step are the same on one process and on eight, before and after a resume.

Two ways to permute ``n`` windows: :func:`table` shuffles a list of them in memory, and
:class:`Keyed` computes each position alone, without memory.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpt.config import WindowOrder

Numbers = NDArray[np.int64]
LARGEST_TABLE = 1 << 22
"""``auto`` permutes more windows than this by :class:`Keyed`; a table needs 8 bytes a window."""
ROUNDS = 8


class Permutation(Protocol):
    """The order of one epoch."""

    def __call__(self, positions: Numbers) -> Numbers:
        """The windows at these positions, ``[n]``."""


def table(n: int, *, seed: int, epoch: int) -> Permutation:
    """A shuffled list of all windows, in memory."""
    windows = np.random.Generator(np.random.Philox((seed, epoch))).permutation(n)
    return lambda positions: windows[positions]


class Keyed:
    """A permutation of ``n`` numbers that is computed for each number alone.

    It is a Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that holds
    ``n``, with a key for each round. A result of ``n`` or more goes through the network again until
    it is below ``n`` (cycle walking: Black and Rogaway, 2002), fewer than four times on average.
    The network can be inverted whatever its round function is, so no number comes twice.
    """

    def __init__(self, n: int, *, seed: int, epoch: int) -> None:
        self.n = n
        self._half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        stream = np.random.SeedSequence((seed, epoch, ROUNDS))  # apart from the seeds of tables
        self._keys = stream.generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: Numbers) -> Numbers:
        """As in :class:`Permutation`."""
        return self._walk(positions, self._forward)

    def positions(self, windows: Numbers) -> Numbers:
        """The inverse: the position of each window in the epoch."""
        return self._walk(windows, self._backward)

    def _walk(
        self, numbers: Numbers, network: Callable[[NDArray[np.uint64]], NDArray[np.uint64]]
    ) -> Numbers:
        out = network(numbers.astype(np.uint64))
        while (outside := out >= self.n).any():
            out[outside] = network(out[outside])
        return out.astype(np.int64)

    def _forward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ self._mixed(right, key)
        return (left << self._half) | right

    def _backward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ self._mixed(left, key), left
        return (left << self._half) | right

    def _mixed(self, x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        """A hash of ``x`` and ``key``: the mixing steps of SplitMix64 (Steele et al., 2014)."""
        x = x ^ key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) & self._mask


class Order:
    """Which of ``n_windows`` each step takes. ``kind`` is ``data.order``."""

    def __init__(
        self, n_windows: int, *, batch_size: int, seed: int, kind: WindowOrder = "auto"
    ) -> None:
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        if kind == "auto":
            kind = "table" if n_windows <= LARGEST_TABLE else "keyed"
        self._permute = {"table": table, "keyed": Keyed}[kind]
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Permutation:
        return self._permute(self.n_windows, seed=self.seed, epoch=epoch)

    def at(self, places: Numbers) -> Numbers:
        """The windows at these places of the endless sequence, ``[n]``."""
        epochs, within = np.divmod(places, self.n_windows)
        windows = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = self._epoch(int(epoch))(within[chosen])
        return windows

    def step(self, step: int) -> Numbers:
        """The windows of ``step`` (from 0), ``[batch_size]``. A step may contain the end of one
        epoch and the start of the next.
        """
        return self.at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))
