"""Attention masks as rules on positions.

A rule takes the positions of queries and keys, broadcast against each other, and says where a query
may look. The same rule serves dense masks, masks by blocks, and ``flex_attention``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MaskRule = Callable[[Tensor, Tensor], Tensor]
"""``(query positions, key positions)`` to True where a query may look."""
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

    def _drawn(self, block: Tensor, number: int) -> Tensor:
        """Of each block, the earlier block of this number, by a hash of both: any device and any
        chunking draws the same.
        """
        mixed = (block * 0x9E3779B1 + (number + 1) * 0x85EBCA77) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) % 2**32
        return (mixed ^ (mixed >> 13)) % (block + 1)


def in_blocks(n_token: int, block: int, sinks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions of the queries in blocks, ``[N, block]``, and of the keys beside each block:
    the first ``sinks``, the block before and its own, ``[N, sinks + 2 block]``; negative where a
    key does not count.
    """
    starts = torch.arange(0, n_token, block, device=device)[:, None]
    near = starts + torch.arange(-block, block, device=device)
    first = torch.arange(sinks, device=device).expand(len(starts), -1)
    first = torch.where(first < starts - block, first, -1)  # the others are near
    return near[:, block:], torch.cat([first, near], dim=1)


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


def dense(rule: MaskRule, at: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of queries at the positions ``at`` over keys at the positions ``keys`` (a negative
    one is no key): ``[n, S]`` for ``at`` ``[n]`` and ``keys`` ``[S]``, or ``[B, 1, n, S]``
    (broadcastable over heads) where either has rows, ``[B, n]`` or ``[B, S]``.
    """
    mask = rule(at[..., :, None], keys[..., None, :]) & (keys >= 0)[..., None, :]
    return as_bias(mask if mask.ndim == 2 else mask[:, None], dtype)
