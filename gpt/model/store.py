"""The memory of a KV cache for layers of one kind: every token, or a ring of the newest ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.model.kinds import Kind
from gpt.model.lengths import Next

SPARE = 64
"""Tokens that a ring holds beyond its attention window: how far a full ring can be truncated."""


@dataclass(frozen=True)
class Slots:
    """Where new tokens go in a store, and which keys their queries read."""

    keys: Tensor
    """The positions of these keys, ``[S]`` or ``[B, S]``; negative where there is none."""
    is_square: bool
    """Whether the keys are those of the new tokens alone."""
    sees_all: bool
    """Whether each query sees all of them: one token a row."""
    to: Tensor | slice
    """The slots of the new tokens. Of more than one in a ring: for each slot the new token that
    goes there, negative where the slot stays, ``[S]`` or ``[B, S]``."""


class Store:
    """Keys and values ``[L, B, Hkv, S, D]`` of ``L`` layers: row ``b``'s token ``t`` is at
    ``keys[:, b, :, t]``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        # Zeros: masked values must still be numbers, since 0 * nan is nan.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = self._new_values()

    def _new_values(self) -> Tensor:
        # not zeros_like, which on `meta` imports sympy
        return torch.zeros(self.keys.shape, dtype=self.keys.dtype, device=self.keys.device)

    @property
    def size(self) -> int:
        """Slots of a row."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def like(self, rows: int, capacity: int) -> "Store":
        """An empty store of the same layers for other numbers of rows and tokens."""
        L, _, H, _, D = self.keys.shape
        return type(self)((L, rows, H, capacity, D), self.keys.dtype, self.keys.device)

    def slots(self, new: Next, valid: Sequence[int] | None) -> Slots:
        """Where the tokens go. Padding goes behind a row's end, where nothing looks."""
        to = new.at if new.start is None else slice(new.start, new.end)
        keys = torch.arange(new.end, device=new.at.device)
        return Slots(keys, new.start == 0, new.start is not None and new.n == 1, to)

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write the keys and values ``[B, Hkv, n, D]`` of the store's ``layer``; returns those that
        the new queries read, as views ``[B, Hkv, S, D]``.
        """
        B, n_key = k.shape[0], slots.keys.shape[-1]
        keys, values = self.keys[layer, :B, :, :n_key], self.values[layer, :B, :, :n_key]
        if isinstance(slots.to, slice):
            keys[:, :, slots.to] = k
            values[:, :, slots.to] = v
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            keys[rows, :, slots.to] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, slots.to] = v.transpose(1, 2).to(values.dtype)
        return keys, values

    def can_forget(self, length: int, peak: int) -> bool:
        """Whether a row that held ``peak`` tokens can go on from ``length``."""
        return True

    def move(self, to: Sequence[int], source: Sequence[int], longest: int) -> None:
        """Copy rows of up to ``longest`` tokens."""
        into, of = (torch.tensor(rows, device=self.keys.device) for rows in (to, source))
        for memory in (self.keys, self.values):
            used = memory[:, :, :, :longest]
            used[:, into] = used[:, of]

    def take(self, start: int, other: "Store", rows: Sequence[int], longest: int) -> None:
        """Put the ``rows`` of another store, of up to ``longest`` tokens, at row ``start`` on."""
        longest = min(longest, self.size, other.size)
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, start : start + len(rows), :, :longest] = its[:, list(rows), :, :longest]


class Copied(Store):
    """What a pointer reads: features as keys, ``[1, B, 1, S, C]``, and as values the tokens'
    numbers, ``[1, B, 1, S, 1]``.
    """

    def _new_values(self) -> Tensor:
        return torch.zeros_like(self.keys[..., :1], dtype=torch.int64)


class Ring(Store):
    """The first ``sinks`` tokens, and a ring of the newest ones: token ``t`` behind the sinks is at
    slot ``sinks + (t - sinks) % (S - sinks)``.

    A ring that is shorter than its kind wants is as long as the cache's capacity, and never wraps.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        *,
        window: int,
        sinks: int,
    ) -> None:
        L, B, H, capacity, D = shape
        super().__init__((L, B, H, min(capacity, sinks + window + SPARE), D), dtype, device)
        self.window, self.sinks = window, sinks

    def like(self, rows: int, capacity: int) -> "Ring":
        """As :meth:`Store.like`."""
        L, _, H, _, D = self.keys.shape
        options = {"window": self.window, "sinks": self.sinks}
        return Ring((L, rows, H, capacity, D), self.keys.dtype, self.keys.device, **options)

    def held(self, lengths: Tensor) -> Tensor:
        """The position of the token in each slot, ``[..., S]``, of rows of ``lengths`` ``[...]``;
        negative where there is none.
        """
        slot = torch.arange(self.size, device=lengths.device)
        last = lengths[..., None] - 1
        newest = last - (last - slot) % max(1, self.size - self.sinks)
        newest = torch.where(newest >= self.sinks, newest, -1)
        return torch.where(slot < self.sinks, torch.where(slot <= last, slot, -1), newest)

    def slots(self, new: Next, valid: Sequence[int] | None) -> Slots:
        """One token is written and then read with the others; more are read beside the ring as it
        was, and then the newest ones are written. Padding is not.
        """
        before = new.at[..., 0]
        if new.n == 1 and valid is None:
            ring = max(1, self.size - self.sinks)
            wrapped = self.sinks + (new.at - self.sinks) % ring
            to = torch.where(new.at < self.sinks, new.at, wrapped)
            keys = self.held(before + 1)[..., : new.end]
            if new.start is not None:
                first = new.start if new.start < self.sinks else (new.start - self.sinks) % ring
                first += 0 if new.start < self.sinks else self.sinks
                return Slots(keys, new.start == 0, False, slice(first, first + 1))
            return Slots(keys, False, False, to)
        count = torch.tensor(valid, device=before.device) if valid is not None else new.n
        goes = self.held(before + count) - before[..., None]
        if new.start == 0:
            return Slots(new.at, True, False, goes)
        old = self.held(before)
        return Slots(torch.cat([old, new.at], dim=-1), False, False, goes)

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """As :meth:`Store.append`, but as copies where several tokens are new."""
        B, n_key = k.shape[0], slots.keys.shape[-1]
        if isinstance(slots.to, slice) or slots.to.shape[-1] == 1 != self.size:
            return super().append(layer, k, v, slots)
        read = []
        for memory, new in ((self.keys[layer, :B], k), (self.values[layer, :B], v)):
            new = new.to(memory.dtype)
            read.append(new if slots.is_square else torch.cat([memory, new], dim=2))
            goes = slots.to.expand(B, -1)[:, None, :, None]  # B, 1, S, 1
            index = goes.clamp(min=0).expand(-1, memory.shape[1], -1, memory.shape[3])
            memory.copy_(torch.where(goes >= 0, new.gather(2, index), memory))
        assert read[0].shape[2] == n_key
        return read[0], read[1]

    def can_forget(self, length: int, peak: int) -> bool:
        """As :meth:`Store.can_forget`: whether the attention window before ``length`` is there."""
        first = peak - (self.size - self.sinks)  # of the positions behind the sinks that are left
        return peak <= self.size or length - self.window + 1 >= first or length <= self.sinks


def make_store(
    kind: Kind,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Store:
    """A store for the layers of this kind; ``shape`` has the cache's capacity as its slots."""
    if kind.window is None:
        return Store(shape, dtype, device)
    return Ring(shape, dtype, device, window=kind.window, sinks=kind.sinks)
