"""What all layers of one forward share. It is computed once and passed to each block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt.model.cache import KVCache, Plan
from gpt.model.kinds import Kind
from gpt.model.masks import Blocks

if TYPE_CHECKING:
    from gpt.model.rotary import DynamicRotation


class Rotation(NamedTuple):
    """The cosines and sines of each position's angles, ``[T, n]`` or ``[B, 1, T, n]``: the first
    ``2 n`` numbers of a head are rotated, number ``i`` with number ``n + i``.
    """

    cos: Tensor
    sin: Tensor
    decay: Tensor | None = None
    """xPos: what queries are multiplied by, and keys divided by, ``[T, n]`` or ``[B, 1, T, n]``."""

    def query(self, q: Tensor) -> Tensor:
        """Queries ``[B, H, T, D]``, rotated (arXiv:2104.09864)."""
        return self._turn(q, self.decay)

    def key(self, k: Tensor) -> Tensor:
        """Keys ``[B, H, T, D]``, rotated."""
        return self._turn(k, None if self.decay is None else 1 / self.decay)

    def _turn(self, x: Tensor, factor: Tensor | None) -> Tensor:
        n = self.cos.shape[-1]
        cos, sin = self.cos, self.sin
        if factor is not None:
            cos, sin = cos * factor, sin * factor
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second, rest = x.split((n, n, x.shape[-1] - 2 * n), dim=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


class Sinks(NamedTuple):
    """How queries that are far from the sinks look at them."""

    rotation: Rotation
    """The rotation of queries towards sinks."""
    keys: Tensor
    """Which keys are sinks, broadcastable to ``[B, H, T, S]``."""


class View(NamedTuple):
    """What the layers of one kind share."""

    mask: Tensor | None
    """The number that is added to the scores, broadcastable to ``[B, H, T, S]``; ``None`` where
    attention is square causal, or has one query for each row that sees every key. With ``blocks``
    the mask of each block, ``[N, 1 or H, size, S]``.
    """
    rotation: Rotation | None
    """By what queries and keys are rotated; ``None`` where they are not."""
    dynamic: "DynamicRotation | None" = None
    """By what queries and keys are rotated when they meet."""
    sinks: Sinks | None = None
    """Where positions are rotated and queries are beyond the window from the sinks."""
    blocks: Blocks | None = None
    """How attention that sees little of a long context is computed, without a cache."""


@dataclass
class Shared:
    """Positions, masks and cache of one forward of ``T`` tokens."""

    at: Tensor
    """The position of each token: ``[T]``, or ``[B, T]`` where the rows' lengths differ."""
    views: Mapping[Kind, View]
    cache: KVCache | None = None
    plan: Plan | None = None
    """Where the tokens go in the cache."""
