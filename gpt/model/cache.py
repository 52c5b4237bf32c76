"""The KV cache: keys and values of the tokens already seen, so that no token is computed twice.

A plain object that is passed to ``GPT.forward``, never a buffer of the model. Its memory is
allocated once. Per token it holds ``2 * n_layer * n_kv_head * head_dim`` numbers (GPT-2's smallest:
18,432, or 36 KiB in bfloat16); layers with an attention window hold a ring, whose memory does not
grow with the text. Stored as ``int8``, a number takes 8 bits, and each head's keys and values
of a token a scale of 32 bits each (:mod:`gpt.model.store`).

The law: for every variant, both kinds of lengths and every chunking, decoding with the cache gives
the full forward's logits. With int8, these are the logits of keys and values that were rounded.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gpt.config import CacheFormat, ModelConfig
from gpt.model.kinds import Kind, layer_kinds
from gpt.model.lengths import DeviceLengths, HostLengths, Next
from gpt.model.store import Copied, Ring, Slots, Store, make_store

COPIED = Kind("copied")
"""Not a layer: what :class:`gpt.model.pointer.Pointer` reads."""


@dataclass(frozen=True)
class Plan:
    """Where the next tokens of each row go."""

    new: Next
    slots: Mapping[Kind, Slots]
    """In the stores of each kind of layer."""
    valid: Sequence[int] | None
    """How many of the tokens count in each row; the rest are padding. ``None``: all."""

    @property
    def at(self) -> Tensor:
        """The tokens' positions, ``[n]``, or ``[B, n]`` where each row has its own."""
        return self.new.at


class KVCache:
    """Keys and values of some sequences (rows), each of a length of its own, up to ``capacity``
    tokens.

    What stands behind a row's length is never looked at. Shorter rows of a batch may be padded at
    their end with any token: :meth:`plan` is told how many tokens are valid.
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
        stored_as: CacheFormat = "float",
    ) -> None:
        """``capacity`` is the model's ``context_length`` unless given. It cannot be more where
        positions are learned. Queries read keys and values in ``dtype``, which are stored in it, or
        with ``stored_as`` int8 in 8 bits. ``on_device`` keeps the lengths in a tensor.
        """
        config = config.resolved()
        capacity = config.context_length if capacity is None else capacity
        most = config.most_positions()
        if capacity < 1 or (most is not None and capacity > most):
            raise ValueError(
                f"the cache's capacity is {capacity}, and must be from 1 to the model's "
                f"context_length ({config.context_length})"
            )
        self.capacity = capacity
        """The most tokens that a row may have."""
        self.stored_as = stored_as
        """Of the keys and values of the layers."""
        kinds = layer_kinds(config)
        self._where = [(kind, kinds[:layer].count(kind)) for layer, kind in enumerate(kinds)]
        self.stores = {
            kind: make_store(
                kind,
                (kinds.count(kind), batch_size, config.n_kv_head, capacity, config.head_dim),
                dtype,
                device,
                stored_as == "int8",
            )
            for kind in dict.fromkeys(kinds)
        }
        """The memory of each kind of layer."""
        if config.copy == "pointer":
            shape = (1, batch_size, 1, capacity, config.n_embd)
            self.stores[COPIED] = Copied(shape, dtype, device)
        self.max_batch_size = batch_size
        """Rows that there is memory for."""
        self._lengths = self._new_lengths([0] * batch_size, on_device=on_device)
        self._peaks = [0] * batch_size  # the most tokens that each row held before a truncation

    def _new_lengths(
        self, lengths: Sequence[int], *, on_device: bool
    ) -> HostLengths | DeviceLengths:
        if on_device:
            return DeviceLengths(lengths, most=self.max_batch_size, device=self.device)
        return HostLengths(lengths)

    @property
    def n_layer(self) -> int:
        """Layers that it is for."""
        return len(self._where)

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
        return self._first.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values that queries read."""
        return self._first.dtype

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values."""
        return sum(store.nbytes for store in self.stores.values())

    @property
    def _first(self) -> Store:
        return next(iter(self.stores.values()))

    def layer(self, layer: int) -> tuple[Store, int]:
        """A layer's store, and the layer's number in it."""
        kind, number = self._where[layer]
        return self.stores[kind], number

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
        self._peaks = list(new)

    @property
    def batch_size(self) -> int:
        """Rows in use, B; :meth:`reorder` and :meth:`add` change it."""
        return self._lengths.rows

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def plan(self, n: int, valid: Sequence[int] | None = None) -> Plan:
        """Where each row's next ``n`` tokens go, of which the first ``valid`` ones count (all
        unless given); ``ValueError`` if they do not fit.
        """
        new = self._lengths.next(n, self.capacity, self.device)
        slots = {kind: store.slots(new, valid) for kind, store in self.stores.items()}
        return Plan(new, slots, valid)

    def append(self, layer: int, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, each ``[B, Hkv, n, D]``, where the ``plan`` says.

        Returns the keys and values that the new queries read, new ones included,
        ``[B, Hkv, S, D]``; ``plan.slots`` has their positions. The lengths move with
        :meth:`advance`, once every layer has appended.
        """
        kind, number = self._where[layer]
        return self.stores[kind].append(number, k, v, plan.slots[kind])

    def advance(self, plan: Plan) -> None:
        """Count the tokens that every layer has appended. ``GPT.forward``, and only it, calls
        this.
        """
        self._lengths.add(plan.new.n, plan.valid)

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forget every token from a position on, one for all rows or one each. Costs nothing.

        ``ValueError`` if a ring no longer holds the attention window before that position.
        """
        held = self.lengths
        wanted = [lengths] * len(held) if isinstance(lengths, int) else list(lengths)
        for length, new in zip(held, wanted, strict=True):
            if not 0 <= new <= length:
                raise ValueError(f"cannot truncate a cache of {length} tokens to {new}")
        if not self.can_truncate(wanted):
            raise ValueError(
                f"cannot truncate a cache of {held} tokens to {wanted}: the attention window "
                "before them was overwritten"
            )
        rings = [store for store in self.stores.values() if isinstance(store, Ring)]
        fresh = min((ring.sinks for ring in rings), default=0)  # a ring of such a row holds nothing
        peaks = [
            new if new <= fresh else max(length, peak)
            for new, length, peak in zip(wanted, held, self._peaks, strict=True)
        ]
        self.lengths, self._peaks = wanted, peaks

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        """Whether what the next tokens see from these lengths on is still there."""
        if not any(isinstance(store, Ring) for store in self.stores.values()):
            return True
        peaks = [max(pair) for pair in zip(self._peaks, self.lengths, strict=True)]
        return all(
            store.can_forget(length, peak)
            for store in self.stores.values()
            for length, peak in zip(lengths, peaks, strict=True)
        )

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
            source = [wanted[i] for i in moved]
            peaks = [max(pair) for pair in zip(self._peaks, lengths, strict=True)]
            for store in self.stores.values():
                store.move(moved, source, max(peaks[row] for row in source))
        peaks = [self._peaks[row] for row in wanted]
        self.lengths, self._peaks = [lengths[row] for row in wanted], peaks

    def add(self, other: "KVCache", rows: Sequence[int] | None = None) -> None:
        """Put rows of ``other`` (all of them unless given) behind these, into memory that
        :meth:`reorder` freed.
        """
        rows, its_lengths = range(other.batch_size) if rows is None else rows, other.lengths
        longest = max((its_lengths[row] for row in rows), default=0)
        start, end = self.batch_size, self.batch_size + len(rows)
        if end > self.max_batch_size or longest > self.capacity:
            raise ValueError(
                f"{len(rows)} rows of up to {longest} tokens do not fit beside {start} in a "
                f"cache of {self.max_batch_size} rows of {self.capacity}"
            )
        peaks = [max(pair) for pair in zip(other._peaks, its_lengths, strict=True)]
        for kind, store in self.stores.items():
            store.take(start, other.stores[kind], rows, max((peaks[r] for r in rows), default=0))
        peaks = self._peaks + [peaks[row] for row in rows]
        self.lengths, self._peaks = self.lengths + [its_lengths[row] for row in rows], peaks

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
        other.capacity = capacity or self.capacity
        other.max_batch_size = n * len(lengths)
        rows = [row for row in range(len(lengths)) for _ in range(n)]
        peaks = [max(pair) for pair in zip(self._peaks, lengths, strict=True)]
        other.stores = {k: s.like(len(rows), other.capacity) for k, s in self.stores.items()}
        for kind, store in self.stores.items():
            other.stores[kind].take(0, store, rows, max(peaks, default=0))
        wide = [lengths[row] for row in rows]
        other._lengths = other._new_lengths(wide, on_device=self.on_device)
        other._peaks = [peaks[row] for row in rows]
        return other

    def padded(self, rows: int) -> Self:
        """A cache whose lengths are on the device: these rows and empty ones behind them, ``rows``
        in all, in the same memory. A forward of all of them advances these rows, and writes
        nothing else that is in use.
        """
        if not self.batch_size <= rows <= self.max_batch_size:
            raise ValueError(
                f"a cache of {self.batch_size} rows, with memory for {self.max_batch_size}, cannot "
                f"be padded to {rows}"
            )
        assert isinstance(self._lengths, DeviceLengths)
        other = copy.copy(self)
        other._lengths = self._lengths.padded(rows)
        other._peaks = self._peaks + [0] * (rows - self.batch_size)
        return other
