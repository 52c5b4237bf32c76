"""Attention masks as rules on positions.

A rule takes the positions of queries and keys, broadcast against each other, and says where a query
may look. The same rule serves masks of all queries by all keys and masks by blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MaskRule = Callable[[Tensor, Tensor], Tensor]
"""``(query positions, key positions)`` to True where a query may look."""
BLOCK = 128
"""Tokens: the least block of a window, for products of a good size."""
ALIGNED = 16
"""The rows of a bias begin at multiples of this many numbers."""


def causal(query: Tensor, key: Tensor) -> Tensor:
    """A query sees its own position and the ones before it."""
    return key <= query


@dataclass(frozen=True)
class window:  # noqa: N801 - a rule is called like a function
    """A query sees ``size`` tokens, its own included, and the first ``sinks`` tokens (Longformer,
    arXiv:2004.05150; attention sinks, arXiv:2309.17453).
    """

    size: int
    sinks: int = 0

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        near = key > query - self.size
        return (key <= query) & (near | (key < self.sinks) if self.sinks else near)

    def read(self, block: Tensor) -> list[Tensor]:
        """The blocks of keys that blocks of queries read, of any size from the window's on."""
        return [block - 1, block]


@dataclass(frozen=True)
class blocks:  # noqa: N801
    """Causal block-sparse attention: a query sees the ``local`` newest blocks of ``size`` tokens
    (its own included), the ``first`` ones (Longformer), and ``random`` earlier ones that are drawn
    for its block (BigBird, arXiv:2007.14062).
    """

    size: int
    local: int
    first: int
    random: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        mine, its = query // self.size, key // self.size
        seen = (its > mine - self.local) | (its < self.first)
        for number in range(self.random):
            seen = seen | (its == self._drawn(mine, number))
        return (key <= query) & seen

    def read(self, block: Tensor) -> list[Tensor]:
        """The blocks of keys that blocks of queries read."""
        first = [torch.where(block >= n, n, -1) for n in range(self.first)]
        drawn = [self._drawn(block, number) for number in range(self.random)]
        return [*(block - n for n in range(self.local)), *first, *drawn]

    def _drawn(self, block: Tensor, number: int) -> Tensor:
        """Of each block, the earlier block of this number, by a hash of both: any device and any
        chunking draws the same.
        """
        mixed = (block * 0x9E3779B1 + (number + 1) * 0x85EBCA77) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) % 2**32
        return (mixed ^ (mixed >> 13)) % (block + 1)


class Blocks(NamedTuple):
    """Attention by blocks of ``size`` queries, each of which reads a few blocks of keys."""

    size: int
    numbers: Tensor
    """The blocks of keys that each block of queries reads, ``[N, K]``; negative: none."""
    sinks: int
    """First keys that every block reads as well."""

    @property
    def at(self) -> Tensor:
        """The queries' positions, ``[N, size]``."""
        n = len(self.numbers)
        return torch.arange(n * self.size, device=self.numbers.device).view(n, self.size)

    @property
    def positions(self) -> Tensor:
        """The keys' positions, ``[N, sinks + K size]``; negative where a key does not count."""
        n, device = len(self.numbers), self.numbers.device
        inside = torch.arange(self.size, device=device)
        near = torch.where(self.numbers >= 0, self.numbers * self.size, -self.size)
        first = torch.arange(self.sinks, device=device).expand(n, -1)
        read = (first // self.size)[..., None] == self.numbers[:, None]
        first = torch.where(read.any(dim=-1), -1, first)  # a block that is read has them
        return torch.cat([first, (near[..., None] + inside).flatten(1)], dim=1)


def in_blocks(rule: MaskRule, n_token: int, device: torch.device) -> Blocks | None:
    """How a rule that sees a small part of ``n_token`` tokens is computed by blocks; ``None`` where
    a mask of all by all is as good.
    """
    if not isinstance(rule, window | blocks):
        return None
    size = rule.size if isinstance(rule, blocks) else max(rule.size, BLOCK)
    mine = torch.arange(-(-n_token // size), device=device)
    index = torch.stack(rule.read(mine), dim=1)
    if n_token <= index.shape[1] * size:
        return None
    again = (index[:, :, None] == index[:, None]).tril(-1).any(dim=-1)
    index = torch.where(again, -1, index)
    return Blocks(size, index, min(rule.sinks, n_token) if isinstance(rule, window) else 0)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the number that is added to the scores: 0 where it is True, minus infinity
    elsewhere.

    Attention would convert the mask in every layer. Rows begin at multiples of 16 numbers, because
    CUDA's memory-efficient kernel copies others, also in every layer.
    """
    n_key = mask.shape[-1]
    padded = F.pad(mask, (0, -n_key % ALIGNED))
    bias = torch.zeros(padded.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~padded, -torch.inf)[..., :n_key]


def dense(
    rule: MaskRule, at: Tensor, keys: Tensor, dtype: torch.dtype, *, same: Tensor | None = None
) -> Tensor:
    """The bias of queries at the positions ``at`` over keys at the positions ``keys`` (a negative
    one is no key): ``[n, S]`` for ``at`` ``[n]`` and ``keys`` ``[S]``, or ``[B, 1, n, S]``
    (broadcastable over heads) where either has rows, ``[B, n]`` or ``[B, S]``. ``same``
    ``[B, n, S]`` is True where query and key belong to the same document.
    """
    mask = rule(at[..., :, None], keys[..., None, :]) & (keys >= 0)[..., None, :]
    mask = mask if same is None else mask & same
    return as_bias(mask if mask.ndim == 2 else mask[:, None], dtype)
