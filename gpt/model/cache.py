"""The KV cache: what every layer computed for the tokens already seen, so that none is run twice.

A plain object that is passed to ``GPT.forward``, never a buffer of the model. Its memory is taken
once. Per token it holds ``2 * n_layer * kv_heads * head_dim`` numbers (GPT-2's smallest: 18,432, or
36 KiB in bfloat16). There are two kinds, with the same methods:

:class:`KVCache`
    knows its lengths as Python ``int``: nothing waits on the device to read them, and attention
    reads no further than the longest row.
:class:`StaticCache`
    knows them as a tensor: every step has the same shapes and the same Python values, so that one
    compiled graph, or one captured CUDA graph, serves them all. Attention reads the whole capacity.

The law: for every variant, every kind and every chunking, decoding with the cache gives the full
forward's logits.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import ModelConfig

ALIGNED = 16
"""The rows of a bias begin at multiples of this many numbers."""


def causal_mask(n_query: int, n_key: int, *, device: torch.device | str | None = None) -> Tensor:
    """True where a query may look: ``[n_query, n_key]``, the last query at the last key."""
    ones = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    return ones.tril(n_key - n_query)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: 0 where it is True, minus infinity elsewhere.

    Attention would make it in every layer. Its rows begin at multiples of 16 numbers: CUDA's
    memory-efficient kernel copies others, also in every layer.
    """
    n_key = mask.shape[-1]
    padded = F.pad(mask, (0, -n_key % ALIGNED))
    bias = torch.zeros(padded.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~padded, -torch.inf)[..., :n_key]


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
    ) -> None:
        """``capacity`` is the model's ``context_length`` unless given (it cannot be more)."""
        capacity = config.context_length if capacity is None else capacity
        if not 0 < capacity <= config.context_length:
            raise ValueError(
                f"the cache's capacity is {capacity}, and must be from 1 to the model's "
                f"context_length ({config.context_length})"
            )
        shape = (config.n_layer, batch_size, config.kv_heads, capacity, config.head_dim)
        # Zeros: what is masked must still be a number, since 0 * nan is nan.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # L, B, Hkv, capacity, D
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size
        """Tokens of each row."""
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def batch_size(self) -> int:
        """Rows in use, B; :meth:`reorder` and :meth:`add` change it."""
        return len(self.lengths)

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

    @property
    def is_ragged(self) -> bool:
        """Whether the rows' lengths differ."""
        lengths = self.lengths
        return min(lengths) != max(lengths)

    def positions(self, n: int) -> Tensor:
        """The positions of each row's next ``n`` tokens: ``[n]``, or ``[B, n]`` where they differ.

        ``ValueError`` if they do not fit.
        """
        self._check_room(n)
        new = torch.arange(n, device=self.keys.device)
        if not self.is_ragged:
            return new + self.lengths[0]
        starts = torch.tensor(self.lengths, device=self.keys.device)
        positions = starts[:, None] + new
        self._places = torch.arange(self.batch_size, device=self.keys.device)[:, None], positions
        return positions

    def _check_room(self, n: int) -> None:
        length = self.length
        if length + n > self.capacity:
            raise ValueError(
                f"the cache holds {length} of {self.capacity} tokens, and {n} more do not fit"
            )

    def mask(self, positions: Tensor) -> Tensor | None:
        """What is added to the scores of the queries at ``positions``: minus infinity where they
        may not look, broadcast over heads. ``None`` where they are square causal, or one a row
        that sees all.
        """
        n, past, dtype = positions.shape[-1], self.length, self.keys.dtype
        if not self.is_ragged:
            if past == 0 or n == 1:
                return None
            return as_bias(causal_mask(n, past + n, device=self.keys.device), dtype)
        keys = torch.arange(past + n, device=self.keys.device)
        return as_bias((keys <= positions[:, :, None])[:, None], dtype)  # B, 1, n, S

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, each ``[B, Hkv, n, D]``, behind the ones it holds.

        Returns all of the layer's, new ones included, as views ``[B, Hkv, length + n, D]``. The
        lengths move only with :meth:`advance`, once every layer has appended.
        """
        end, rows = self.length + k.shape[2], self.batch_size
        keys, values = self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]
        if self.is_ragged:
            assert self._places is not None, "positions() goes before"
            row, position = self._places
            keys[row, :, position] = k.transpose(1, 2).to(keys.dtype)
            values[row, :, position] = v.transpose(1, 2).to(keys.dtype)
        else:
            keys[:, :, self.length :] = k
            values[:, :, self.length :] = v
        return keys, values

    def advance(self, n: int) -> None:
        """Count the ``n`` tokens a row that every layer has appended. ``GPT.forward``, and only it,
        calls this.
        """
        self.lengths = [length + n for length in self.lengths]

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
        other = object.__new__(type(self))
        L, _, H, S, D = self.keys.shape
        B, S = len(lengths), capacity or S
        other.keys, other.values = (
            m.new_zeros(L, B * n, H, S, D) for m in (self.keys, self.values)
        )
        other.lengths = [length for length in lengths for _ in range(n)]
        other._places = None
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            used = mine[:, :B, :, :longest]
            its[:, :, :, :longest] = used.repeat_interleave(n, dim=1)
        return other


class StaticCache(KVCache):
    """A :class:`KVCache` whose lengths are a tensor, for compiled decoding.

    A forward of ``n`` tokens has the same shapes whatever the cache holds. In a compiled graph and
    on a GPU, that the tokens fit is the caller's to see to. The number of rows is known to the
    host; :attr:`lengths` reads the tensor, and waits for the device, which each method does once at
    most.
    """

    _lengths: Tensor
    _memory: Tensor

    @property
    def batch_size(self) -> int:
        """Rows in use, B."""
        return self._lengths.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, read from the device."""
        lengths: list[int] = self._lengths.tolist()
        return lengths

    @lengths.setter
    def lengths(self, new: Sequence[int]) -> None:
        if not hasattr(self, "_memory"):
            self._memory = torch.zeros(
                self.max_batch_size, dtype=torch.int64, device=self.keys.device
            )
        self._lengths = self._memory[: len(new)]  # a captured graph reads this memory
        self._lengths.copy_(torch.tensor(new, dtype=torch.int64))

    def padded(self, rows: int) -> Self:
        """These rows and empty ones behind them, ``rows`` in all, in the same memory: a step of
        both moves these rows on, and writes nothing else that is in use.
        """
        if not self.batch_size <= rows <= self.max_batch_size:
            raise ValueError(
                f"a cache of {self.batch_size} rows, with memory for {self.max_batch_size}, cannot "
                f"be padded to {rows}"
            )
        other = copy.copy(self)
        other._lengths = self._memory[:rows]
        other._lengths[self.batch_size :] = 0
        return other

    def positions(self, n: int) -> Tensor:
        """The positions of each row's next ``n`` tokens, ``[B, n]``. On a CPU, ``ValueError`` if
        they do not fit.
        """
        if self.keys.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_room(n)
        return self._next(n)

    def _next(self, n: int) -> Tensor:
        return self._lengths[:, None] + torch.arange(n, device=self.keys.device)

    def mask(self, positions: Tensor) -> Tensor:
        """What is added to the scores of the queries at ``positions``, ``[B, 1, n, capacity]``."""
        keys = torch.arange(self.capacity, device=self.keys.device)
        return as_bias((keys <= positions[:, :, None])[:, None], self.keys.dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, each ``[B, Hkv, n, D]``; returns the whole
        memory's, ``[B, Hkv, capacity, D]``.
        """
        B, _, n, _ = k.shape
        rows = torch.arange(B, device=k.device)[:, None]
        keys, values = self.keys[layer, :B], self.values[layer, :B]
        positions = self._next(n)
        keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, positions] = v.transpose(1, 2).to(keys.dtype)
        return keys, values

    def advance(self, n: int) -> None:
        """Count the ``n`` tokens a row that every layer has appended, on the device."""
        self._lengths += n
