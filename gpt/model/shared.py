"""What all layers of one forward share. It is computed once and passed to each block."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.model.cache import KVCache, Slots


class Rotation(NamedTuple):
    """The cosines and sines of each position's angles, ``[T, D / 2]`` or ``[B, 1, T, D / 2]``."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """``x`` ``[B, H, T, D]``, each pair of its halves rotated (arXiv:2104.09864)."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class Shared:
    """Positions, mask and cache of one forward of ``T`` tokens."""

    at: Tensor
    """The position of each token: ``[T]``, or ``[B, T]`` where the rows' lengths differ."""
    rotation: Rotation | None = None
    """By what queries and keys are rotated; ``None`` where they are not."""
    mask: Tensor | None = None
    """The number that is added to the scores, broadcastable to ``[B, H, T, S]``; ``None`` where
    attention is square causal, or has one query for each row that sees every key.
    """
    cache: KVCache | None = None
    slots: Slots | None = None
    """Where the tokens go in the cache."""
