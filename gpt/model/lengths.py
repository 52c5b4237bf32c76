"""How many tokens each row of a cache holds, on the host or on the device.

:class:`HostLengths`
    Python integers: nothing waits for the device to read them, and attention reads no further than
    the longest row.
:class:`DeviceLengths`
    a tensor: every forward has the same shapes and the same Python values, so that one compiled
    graph, or one captured CUDA graph, serves them all. Attention reads the whole capacity.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Next:
    """The next ``n`` tokens of each row."""

    at: Tensor
    """Their positions, ``[n]``, or ``[B, n]`` where each row has its own."""
    start: int | None
    """The first position, where it is the same in all rows and the host knows it."""
    end: int
    """One more than the last position that any row may reach."""

    @property
    def n(self) -> int:
        """Tokens of each row."""
        return self.at.shape[-1]


class HostLengths:
    """The rows' lengths as Python integers."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.numbers = list(lengths)

    def set(self, lengths: Sequence[int]) -> None:
        """Other lengths, perhaps of another number of rows."""
        self.numbers = list(lengths)

    def add(self, n: int, valid: Sequence[int] | None = None) -> None:
        """``n`` more tokens in each row, or as many as are ``valid`` in it."""
        more = [n] * self.rows if valid is None else valid
        self.numbers = [length + new for length, new in zip(self.numbers, more, strict=True)]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.numbers)

    def next(self, n: int, capacity: int, device: torch.device) -> Next:
        """``n`` more tokens in each row; ``ValueError`` if they do not fit."""
        longest, shortest = max(self.numbers, default=0), min(self.numbers, default=0)
        _check_room(longest, n, capacity)
        new = torch.arange(n, device=device)
        if longest == shortest:
            return Next(new + longest, longest, longest + n)
        starts = torch.tensor(self.numbers, device=device)
        return Next(starts[:, None] + new, None, longest + n)


class DeviceLengths:
    """The rows' lengths as a tensor at a fixed address, which a captured graph reads. Only the
    number of rows is known to the host; reading :attr:`numbers` waits for the device.
    """

    def __init__(self, lengths: Sequence[int], *, most: int, device: torch.device) -> None:
        self.memory = torch.zeros(most, dtype=torch.int64, device=device)
        self.set(lengths)

    def set(self, lengths: Sequence[int]) -> None:
        """Other lengths, perhaps of another number of rows."""
        self.tensor = self.memory[: len(lengths)]
        self.tensor.copy_(torch.tensor(lengths, dtype=torch.int64, device="cpu"))

    def padded(self, rows: int) -> Self:
        """These lengths and zeros behind them, ``rows`` in all, in the same memory."""
        other = copy.copy(self)
        other.tensor = self.memory[:rows]
        other.tensor[self.rows :] = 0
        return other

    def add(self, n: int, valid: Sequence[int] | None = None) -> None:
        """``n`` more tokens in each row, or as many as are ``valid`` in it, on the device."""
        self.tensor += n if valid is None else torch.tensor(valid, device=self.tensor.device)

    @property
    def numbers(self) -> list[int]:
        """The lengths, read from the device."""
        lengths: list[int] = self.tensor.tolist()
        return lengths

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.tensor.shape[0]

    def check_room(self, n: int, capacity: int) -> None:
        """``ValueError`` if ``n`` more tokens do not fit. Reads the lengths."""
        _check_room(max(self.numbers, default=0), n, capacity)

    def next(self, n: int, capacity: int, device: torch.device) -> Next:
        """``n`` more tokens in each row. On a CPU, ``ValueError`` if they do not fit; in a compiled
        graph and on a GPU that is the caller's to see to.
        """
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_room(n, capacity)
        at = self.tensor[:, None] + torch.arange(n, device=device)
        return Next(at, None, capacity)


def _check_room(length: int, n: int, capacity: int) -> None:
    if length + n > capacity:
        raise ValueError(f"the cache holds {length} of {capacity} tokens, and {n} more do not fit")
