"""The memory of a KV cache for layers of one kind: every token, or a ring of the newest ones.

Keys and values are stored in the cache's dtype, or rounded to 8 bits: then each row (the key or the
value of one token and head) has a scale, its largest absolute number over 127. Rows are rounded
when they are written, and queries read the rounded ones, also those of tokens of the same forward.
So the numbers that a query reads do not depend on how the text was cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.model.kinds import Kind
from gpt.model.lengths import Next

Shape = tuple[int, int, int, int, int]
"""Layers, rows, heads, slots, and the width of a head."""
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

    scales: tuple[Tensor, ...] = ()
    """Those of keys and values, float32 ``[L, B, Hkv, S, 1]``, if these are int8."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        rounded: bool = False,
    ) -> None:
        # Zeros: masked values must still be numbers, since 0 * nan is nan.
        stored = torch.int8 if rounded else dtype
        self.keys = torch.zeros(shape, dtype=stored, device=device)
        self.values = self._new_values()
        self.dtype = (dtype or torch.get_default_dtype()) if rounded else self.keys.dtype
        """Of what queries read."""
        if rounded:
            key_scales = torch.zeros(*shape[:-1], 1, dtype=torch.float32, device=device)
            self.scales = key_scales, torch.zeros_like(key_scales)

    def _new_values(self) -> Tensor:
        # not zeros_like, which on `meta` imports sympy
        return torch.zeros(self.keys.shape, dtype=self.keys.dtype, device=self.keys.device)

    @property
    def size(self) -> int:
        """Slots of a row."""
        return self.keys.shape[3]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values, and their scales if they have any."""
        return self.keys, self.values, *self.scales

    @property
    def nbytes(self) -> int:
        """Of all :attr:`tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def like(self, rows: int, capacity: int) -> "Store":
        """An empty store of the same layers for other numbers of rows and tokens."""
        L, _, H, _, D = self.keys.shape
        return self._new((L, rows, H, capacity, D))

    def _new(self, shape: Shape) -> "Store":
        return type(self)(shape, self.dtype, self.keys.device, bool(self.scales))

    def _stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """New keys and values ``[B, Hkv, n, D]`` as :attr:`tensors` has them."""
        if not self.scales:
            return k.to(self.keys.dtype), v.to(self.values.dtype)
        (keys, key_scales), (values, value_scales) = round_rows(k), round_rows(v)
        return keys, values, key_scales, value_scales

    def _read(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values from parts of :attr:`tensors`."""
        keys, values, *scales = stored
        if scales:
            keys, values = (
                (x * s).to(self.dtype) for x, s in zip((keys, values), scales, strict=True)
            )
        return keys, values

    def slots(self, new: Next, valid: Sequence[int] | None) -> Slots:
        """Where the tokens go. Padding goes behind a row's end, where nothing looks."""
        to = new.at if new.start is None else slice(new.start, new.end)
        keys = torch.arange(new.end, device=new.at.device)
        return Slots(keys, new.start == 0, new.start is not None and new.n == 1, to)

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write the keys and values ``[B, Hkv, n, D]`` of the store's ``layer``; returns those that
        the new queries read, ``[B, Hkv, S, D]``: views, unless they are rounded.
        """
        B, n_key = k.shape[0], slots.keys.shape[-1]
        held = [tensor[layer, :B, :, :n_key] for tensor in self.tensors]
        rows = None if isinstance(slots.to, slice) else torch.arange(B, device=k.device)[:, None]
        for memory, new in zip(held, self._stored(k, v), strict=True):
            if rows is None:
                memory[:, :, slots.to] = new
            else:
                memory[rows, :, slots.to] = new.transpose(1, 2)
        return self._read(held)

    def can_forget(self, length: int, peak: int) -> bool:
        """Whether a row that held ``peak`` tokens can go on from ``length``."""
        return True

    def move(self, to: Sequence[int], source: Sequence[int], longest: int) -> None:
        """Copy rows of up to ``longest`` tokens."""
        into, of = (torch.tensor(rows, device=self.keys.device) for rows in (to, source))
        for memory in self.tensors:
            used = memory[:, :, :, :longest]
            used[:, into] = used[:, of]

    def take(self, start: int, other: "Store", rows: Sequence[int], longest: int) -> None:
        """Put the ``rows`` of another store, of up to ``longest`` tokens, at row ``start`` on."""
        longest = min(longest, self.size, other.size)
        for mine, its in zip(self.tensors, other.tensors, strict=True):
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
        shape: Shape,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        rounded: bool = False,
        *,
        window: int,
        sinks: int,
    ) -> None:
        L, B, H, capacity, D = shape
        size = min(capacity, sinks + window + SPARE)
        super().__init__((L, B, H, size, D), dtype, device, rounded)
        self.window, self.sinks = window, sinks

    def _new(self, shape: Shape) -> "Ring":
        where = self.dtype, self.keys.device, bool(self.scales)
        return Ring(shape, *where, window=self.window, sinks=self.sinks)

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
        held = (tensor[layer, :B] for tensor in self.tensors)
        for memory, new in zip(held, self._stored(k, v), strict=True):
            read.append(new if slots.is_square else torch.cat([memory, new], dim=2))
            goes = slots.to.expand(B, -1)[:, None, :, None]  # B, 1, S, 1
            index = goes.clamp(min=0).expand(-1, memory.shape[1], -1, memory.shape[3])
            memory.copy_(torch.where(goes >= 0, new.gather(2, index), memory))
        assert read[0].shape[2] == n_key
        return self._read(read)

    def can_forget(self, length: int, peak: int) -> bool:
        """As :meth:`Store.can_forget`: whether the attention window before ``length`` is there."""
        first = peak - (self.size - self.sinks)  # of the positions behind the sinks that are left
        return peak <= self.size or length - self.window + 1 >= first or length <= self.sinks


def make_store(
    kind: Kind,
    shape: Shape,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    rounded: bool = False,
) -> Store:
    """A store for the layers of this kind; ``shape`` has the cache's capacity as its slots."""
    if kind.window is None:
        return Store(shape, dtype, device, rounded)
    return Ring(shape, dtype, device, rounded, window=kind.window, sinks=kind.sinks)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[..., D]`` as int8, and the scale of each, float32 ``[..., 1]``: the numbers are
    ``int8 * scale``, each within half a scale of what it was. The scale of a row that is not all
    numbers is not a number.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True) / 127
    steps = torch.where(scales > 0, x / scales, 0.0)  # also where the scale is not a number
    return steps.round().clamp(-127, 127).to(torch.int8), scales
