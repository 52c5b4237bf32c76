"""How tokens know their positions.

A scheme has three hooks, each a no-op by default, and the model always calls all three.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig, PositionScheme
from gpt.model.initial import normal, table
from gpt.model.shared import Rotation


class Position(nn.Module):
    """A position scheme that does nothing (``none``)."""

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """What enters the first block: token embeddings ``x`` ``[B, T, C]`` at the positions ``at``
        (``[T]`` or ``[B, T]``).
        """
        return x

    def rotation(self, at: Tensor) -> Rotation | None:
        """By what queries and keys at the positions ``at`` are rotated."""
        return None

    def bias(self, at: Tensor, n_key: int) -> Tensor | None:
        """The number that is added to the scores of queries at ``at`` over keys 0 to ``n_key - 1``,
        broadcastable to ``[B, H, T, n_key]``.
        """
        return None

    def crop(self, context_length: int) -> None:
        """Forget positions from ``context_length`` on."""


class LearnedPosition(Position):
    """An embedding for each position (Gehring et al., 2017, arXiv:1705.03122), as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = table(torch.empty(config.context_length, config.n_embd)).weight

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """``x`` plus the embedding of each position."""
        return x + nn.functional.embedding(at, self.weight).to(x.dtype)

    def reset(self) -> None:
        """N(0, 0.02)."""
        normal(self)

    def crop(self, context_length: int) -> None:
        """Keep the first ``context_length`` embeddings."""
        self.weight = nn.Parameter(self.weight[:context_length].clone())


POSITIONS: dict[PositionScheme, Callable[[ModelConfig], Position]] = {"learned": LearnedPosition}
"""The configuration's ``position`` to what makes one."""
