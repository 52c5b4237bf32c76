"""The KV cache: keys and values of the tokens already seen, so that no token is computed twice.

A plain object that is passed to ``GPT.forward``, never a buffer of the model. Its memory is
allocated once. Per token it holds ``2 * n_layer * n_kv_head * head_dim`` numbers (GPT-2's smallest:
18,432, or 36 KiB in bfloat16). The lengths of its rows are one of two:

:class:`HostLengths`
    Python integers: nothing waits for the device to read them, and attention reads no further than
    the longest row.
:class:`DeviceLengths`
    a tensor: every step has the same shapes and the same Python values, so that one compiled graph,
    or one captured CUDA graph, serves them all. Attention reads the whole capacity.

The law: for every variant, both kinds of lengths and every chunking, decoding with the cache gives
the full forward's logits.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gpt.config import ModelConfig
from gpt.model.masks import MaskRule, causal, dense


@dataclass(frozen=True)
class Slots:
    """Where the next ``n`` tokens of each row go."""

    at: Tensor
    """Their positions, ``[n]``, or ``[B, n]`` where each row has its own."""
    n_key: int
    """Slots that attention reads, from 0."""
    start: int | None
    """The first of the slots where all rows write; ``None`` where each row writes at ``at``."""
    sees_all: bool
    """Whether attention needs no mask: it is square causal, or each query sees every key."""


class HostLengths:
    """The rows' lengths as Python integers."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.numbers = list(lengths)

    def set(self, lengths: Sequence[int]) -> None:
        """Other lengths, perhaps of another number of rows."""
        self.numbers = list(lengths)

    def add(self, n: int) -> None:
        """``n`` more tokens in each row."""
        self.numbers = [length + n for length in self.numbers]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.numbers)

    def next(self, n: int, capacity: int, device: torch.device) -> Slots:
        """Where ``n`` more tokens go; ``ValueError`` if they do not fit."""
        longest, shortest = max(self.numbers, default=0), min(self.numbers, default=0)
        _check_room(longest, n, capacity)
        new = torch.arange(n, device=device)
        end = longest + n
        if longest == shortest:
            return Slots(new + longest, end, longest, sees_all=longest == 0 or n == 1)
        starts = torch.tensor(self.numbers, device=device)
        return Slots(starts[:, None] + new, end, None, sees_all=False)


class DeviceLengths:
    """The rows' lengths as a tensor in memory of a fixed place, which a captured graph reads. Only
    the number of rows is known to the host; reading :attr:`numbers` waits for the device.
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

    def add(self, n: int) -> None:
        """``n`` more tokens in each row, on the device."""
        self.tensor += n

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

    def next(self, n: int, capacity: int, device: torch.device) -> Slots:
        """Where ``n`` more tokens go. On a CPU, ``ValueError`` if they do not fit; in a compiled
        graph and on a GPU that is the caller's to see to.
        """
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_room(n, capacity)
        at = self.tensor[:, None] + torch.arange(n, device=device)
        return Slots(at, capacity, None, sees_all=False)


def _check_room(length: int, n: int, capacity: int) -> None:
    if length + n > capacity:
        raise ValueError(f"the cache holds {length} of {capacity} tokens, and {n} more do not fit")


class KVCache:
    """Keys and values of some sequences (rows), each of a length of its own, up to ``capacity``
    tokens.

    Row ``b``'s token ``t`` is at ``keys[:, b, :, t]``. What stands behind a row's length is never
    looked at: shorter rows of a batch may be padded at their end with any token, and truncated
    after the forward.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        on_device: bool = False,
    ) -> None:
        """``capacity`` is the model's ``context_length`` unless given (it cannot be more).
        ``on_device`` keeps the lengths in a tensor.
        """
        config = config.resolved()
        capacity = config.context_length if capacity is None else capacity
        if not 0 < capacity <= config.context_length:
            raise ValueError(
                f"the cache's capacity is {capacity}, and must be from 1 to the model's "
                f"context_length ({config.context_length})"
            )
        shape = (config.n_layer, batch_size, config.n_kv_head, capacity, config.head_dim)
        # Zeros: masked values must still be numbers, since 0 * nan is nan.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # L, B, Hkv, capacity, D
        self.values = torch.zeros_like(self.keys)
        self._lengths = self._new_lengths([0] * batch_size, on_device=on_device)

    def _new_lengths(
        self, lengths: Sequence[int], *, on_device: bool
    ) -> HostLengths | DeviceLengths:
        if on_device:
            return DeviceLengths(lengths, most=self.max_batch_size, device=self.keys.device)
        return HostLengths(lengths)

    @property
    def on_device(self) -> bool:
        """Whether the lengths are a tensor."""
        return isinstance(self._lengths, DeviceLengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; where they are on the device, reading them waits for it."""
        return self._lengths.numbers

    @lengths.setter
    def lengths(self, new: Sequence[int]) -> None:
        self._lengths.set(new)

    @property
    def batch_size(self) -> int:
        """Rows in use, B; :meth:`reorder` and :meth:`add` change it."""
        return self._lengths.rows

    @property
    def max_batch_size(self) -> int:
        """Rows that there is memory for."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def capacity(self) -> int:
        """The most tokens that a row may have."""
        return self.keys.shape[3]

    def plan(self, n: int) -> Slots:
        """Where each row's next ``n`` tokens go; ``ValueError`` if they do not fit."""
        return self._lengths.next(n, self.capacity, self.keys.device)

    def mask(self, slots: Slots, rule: MaskRule = causal) -> Tensor | None:
        """The number that is added to the scores of the queries in ``slots``: minus infinity where
        they may not look, broadcast over heads. ``None`` where no mask is needed.
        """
        if slots.sees_all:
            return None
        return dense(rule, slots.at, slots.n_key, self.keys.dtype)

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, each ``[B, Hkv, n, D]``, into their ``slots``.

        Returns the layer's keys and values, new ones included, as views ``[B, Hkv, n_key, D]``. The
        lengths move with :meth:`advance`, once every layer has appended.
        """
        B = k.shape[0]
        keys = self.keys[layer, :B, :, : slots.n_key]
        values = self.values[layer, :B, :, : slots.n_key]
        if slots.start is not None:
            keys[:, :, slots.start :] = k
            values[:, :, slots.start :] = v
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            keys[rows, :, slots.at] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, slots.at] = v.transpose(1, 2).to(keys.dtype)
        return keys, values

    def advance(self, n: int) -> None:
        """Count the ``n`` tokens a row that every layer has appended. ``GPT.forward``, and only it,
        calls this.
        """
        self._lengths.add(n)

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forget every token from a position on, one for all rows or one each. Costs nothing."""
        held = self.lengths
        wanted = [lengths] * len(held) if isinstance(lengths, int) else list(lengths)
        for length, new in zip(held, wanted, strict=True):
            if not 0 <= new <= length:
                raise ValueError(f"cannot truncate a cache of {length} tokens to {new}")
        self.lengths = wanted

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was (a beam's parents); fewer rows drop the rest.

        Only rows that move are copied; where none does and none is dropped, nothing is done.
        """
        wanted, there = rows.tolist() if isinstance(rows, Tensor) else list(rows), self.batch_size
        if len(wanted) > self.max_batch_size or not all(0 <= r < there for r in wanted):
            raise ValueError(
                f"rows is {wanted}, and must name up to {self.max_batch_size} of the "
                f"{there} rows there are"
            )
        if wanted == list(range(there)):
            return
        lengths = self.lengths
        moved = [i for i, row in enumerate(wanted) if i != row]
        if moved:
            to = torch.tensor(moved, device=self.keys.device)
            source = torch.tensor([wanted[i] for i in moved], device=self.keys.device)
            longest = max(lengths[wanted[i]] for i in moved)
            for memory in (self.keys, self.values):
                used = memory[:, :, :, :longest]
                used[:, to] = used[:, source]
        self.lengths = [lengths[row] for row in wanted]

    def add(self, other: "KVCache", rows: Sequence[int] | None = None) -> None:
        """Put rows of ``other`` (all of them unless given) behind these, into memory that
        :meth:`reorder` freed.
        """
        rows, its_lengths = range(other.batch_size) if rows is None else rows, other.lengths
        longest = max(its_lengths, default=0)
        start, end = self.batch_size, self.batch_size + len(rows)
        if end > self.max_batch_size or longest > self.capacity:
            raise ValueError(
                f"{len(rows)} rows of up to {longest} tokens do not fit beside {start} in a "
                f"cache of {self.max_batch_size} rows of {self.capacity}"
            )
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            used = its[:, list(rows), :, :longest]
            mine[:, start:end, :, :longest] = used
        self.lengths = self.lengths + [its_lengths[row] for row in rows]

    def expand(self, n: int, *, capacity: int | None = None) -> Self:
        """A new cache with each row ``n`` times, side by side: one prefill, ``n`` continuations."""
        if n < 1:
            raise ValueError(f"cannot expand a cache by {n}")
        lengths = self.lengths
        longest = max(lengths, default=0)
        if capacity is not None and capacity < longest:
            raise ValueError(
                f"the cache holds {longest} tokens, which do not fit a capacity of {capacity}"
            )
        other = copy.copy(self)
        L, _, H, S, D = self.keys.shape
        B, S = len(lengths), capacity or S
        other.keys, other.values = (
            m.new_zeros(L, B * n, H, S, D) for m in (self.keys, self.values)
        )
        wide = [length for length in lengths for _ in range(n)]
        other._lengths = other._new_lengths(wide, on_device=self.on_device)
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            used = mine[:, :B, :, :longest]
            its[:, :, :, :longest] = used.repeat_interleave(n, dim=1)
        return other

    def padded(self, rows: int) -> Self:
        """A cache whose lengths are on the device: these rows and empty ones behind them, ``rows``
        in all, in the same memory. A step of both moves these rows on, and writes nothing else that
        is in use.
        """
        if not self.batch_size <= rows <= self.max_batch_size:
            raise ValueError(
                f"a cache of {self.batch_size} rows, with memory for {self.max_batch_size}, cannot "
                f"be padded to {rows}"
            )
        assert isinstance(self._lengths, DeviceLengths)
        other = copy.copy(self)
        other._lengths = self._lengths.padded(rows)
        return other
