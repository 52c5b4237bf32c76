"""How tokens know their positions.

A scheme has hooks, each a no-op by default, and the model always calls all of them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig, PositionScheme
from gpt.model.initial import normal, table
from gpt.model.kinds import Kind
from gpt.model.rotary import DynamicRotation, frequencies
from gpt.model.shared import Rotation


class Position(nn.Module):
    """A position scheme that does nothing (``none``, arXiv:2203.16634): its hooks are no-ops."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.resolved()

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """What enters the first block: token embeddings ``x`` ``[B, T, C]`` at the positions ``at``
        (``[T]`` or ``[B, T]``).
        """
        return x

    def rotation(self, at: Tensor, kind: Kind) -> Rotation | None:
        """By what queries and keys at the positions ``at`` are rotated in layers of a kind."""
        return None

    def dynamic(self, at: Tensor, keys: Tensor, kind: Kind) -> DynamicRotation | None:
        """Instead of :meth:`rotation`: by what queries at ``at`` and keys at ``keys`` are
        rotated when they meet.
        """
        return None

    def bias(self, at: Tensor, keys: Tensor, kind: Kind) -> Tensor | None:
        """The number that is added to the scores of queries at ``at`` ``[..., T]`` over keys at the
        positions ``keys`` ``[..., S]``: ``[..., H, T, S]``.
        """
        return None

    def crop(self, context_length: int) -> None:
        """Forget positions from ``context_length`` on."""


class LearnedPosition(Position):
    """An embedding for each position (Gehring et al., 2017, arXiv:1705.03122), as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
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


class SinusoidalPosition(Position):
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi are added (Vaswani et al., 2017,
    arXiv:1706.03762, section 3.5).
    """

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """``x`` plus the waves of each position, sines in even and cosines in odd numbers."""
        pairs = torch.arange(self.config.n_embd // 2, device=at.device)
        angles = at[..., None] / 10_000.0 ** (2 * pairs / self.config.n_embd)
        return x + torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(x.dtype)


class RotaryPosition(Position):
    """Queries and keys are rotated by angles that grow with the position, so that their score
    depends on the distance (Su et al., 2021, arXiv:2104.09864).
    """

    def rotation(self, at: Tensor, kind: Kind) -> Rotation | None:
        """Angles of :func:`gpt.model.rotary.frequencies`; YaRN's temperature is in both factors."""
        if self.config.rotary_scaling == "dynamic_ntk":
            return None
        turns, temperature = frequencies(self.config, kind.rotary_base, at.device)
        angles = _over_heads(at)[..., None] * turns
        return Rotation(temperature * angles.cos(), temperature * angles.sin(), self.decay(at))

    def dynamic(self, at: Tensor, keys: Tensor, kind: Kind) -> DynamicRotation | None:
        """For ``dynamic_ntk``."""
        if self.config.rotary_scaling != "dynamic_ntk":
            return None
        return DynamicRotation(self.config, kind.rotary_base, at, keys)

    def decay(self, at: Tensor) -> Tensor | None:
        """What queries are multiplied by and keys divided by."""
        zeta = self.zeta()
        return None if zeta is None else zeta.to(at.device) ** (_over_heads(at)[..., None] / 512)

    def zeta(self) -> Tensor | None:
        """The decay (xPos) of each pair over 512 positions."""
        return None


class XPosition(RotaryPosition):
    """Rotary positions whose scores decay with the distance, fast frequencies first (Sun et al.,
    2022, arXiv:2212.10554: gamma 0.4, scale base 512).
    """

    def zeta(self) -> Tensor:
        """``(i / n + 0.4) / 1.4`` for pair ``i`` of ``n``."""
        n = int(self.config.head_dim * self.config.rotary_fraction) // 2
        return (torch.arange(n, device="cpu") / n + 0.4) / 1.4


class ALiBi(Position):
    """Scores fall linearly with the distance, in each head with another slope (Press et al., 2022,
    arXiv:2108.12409).
    """

    def bias(self, at: Tensor, keys: Tensor, kind: Kind) -> Tensor:
        """``slope * (key - query)`` for each head."""
        slopes = torch.tensor(alibi_slopes(self.config.n_head), device=at.device)
        at, keys = at[..., :, None], keys[..., None, :]
        if kind.last_to_sinks is not None:
            at = torch.where(keys < kind.sinks, at.clamp(max=kind.last_to_sinks), at)
        distance = (keys - at).clamp(max=0)
        return slopes[:, None, None] * distance[..., None, :, :]


def alibi_slopes(n_head: int) -> list[float]:
    """``2 ** (-8 i / n)`` for heads 1 to n, where n is a power of two; else those of the next lower
    power, and every other one of the next higher (as the paper's code has it).
    """
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    more = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return slopes + more[: n_head - n]


def _over_heads(at: Tensor) -> Tensor:
    """Positions ``[T]``, or ``[B, T]`` as ``[B, 1, T]``."""
    return at if at.ndim == 1 else at[:, None]


POSITIONS: dict[PositionScheme, Callable[[ModelConfig], Position]] = {
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rotary": RotaryPosition,
    "xpos": XPosition,
    "alibi": ALiBi,
    "none": Position,
}
"""The configuration's ``position`` to what makes one."""
