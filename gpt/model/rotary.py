"""The frequencies of rotary positions, and how they are scaled for contexts longer than those of
training.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpt.config import ModelConfig, RotaryScaling
from gpt.model.shared import Rotation


def frequencies(
    config: ModelConfig, base: float, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """The angle by which each pair of a head's numbers turns from a position to the next, ``[n]``
    of float32, in radians; and the number that queries and keys are multiplied by. ``config`` is
    resolved.
    """
    n = int(config.head_dim * config.rotary_fraction) // 2
    exponents = torch.arange(0, 2 * n, 2, dtype=torch.int64, device=device).float() / (2 * n)
    if config.rotary_scaling == "ntk":
        base *= config.rotary_scaling_factor ** (2 * n / max(1, 2 * n - 2))
    plain = 1.0 / base**exponents
    return SCALINGS[config.rotary_scaling](config, base, plain)


def _plain(config: ModelConfig, base: float, turns: Tensor) -> tuple[Tensor, float]:
    """As they are. ``ntk`` has another base (bloc97, 2023), and :class:`DynamicRotation` one that
    follows the length.
    """
    return turns, 1.0


def _linear(config: ModelConfig, base: float, turns: Tensor) -> tuple[Tensor, float]:
    """Positions are interpolated (Chen et al., 2023, arXiv:2306.15595)."""
    return turns / config.rotary_scaling_factor, 1.0


def _yarn(config: ModelConfig, base: float, turns: Tensor) -> tuple[Tensor, float]:
    """Pairs that turn often over the trained length stay, those that turn less than once are
    interpolated, with a ramp between them (Peng et al., 2023, arXiv:2309.00071).
    """
    width, trained = 2 * len(turns), config.rotary_trained_length

    def pair(rotations: float) -> float:  # that turns so often over the trained length
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(config.rotary_high_frequency)), 0)
    high = min(math.ceil(pair(config.rotary_low_frequency)), width - 1)
    ramp = (torch.arange(len(turns), device=turns.device) - low) / max(high - low, 0.001)
    stays = 1 - ramp.clamp(0, 1)
    scaled = turns / config.rotary_scaling_factor * (1 - stays) + turns * stays
    return scaled, config.rotary_temperature


def _llama3(config: ModelConfig, base: float, turns: Tensor) -> tuple[Tensor, float]:
    """Slow pairs are interpolated, fast ones stay, with a ramp in the turns over the trained length
    between them (Llama 3.1).
    """
    low, high = config.rotary_low_frequency, config.rotary_high_frequency
    rotations = config.rotary_trained_length * turns / (2 * math.pi)
    stays = ((rotations - low) / (high - low)).clamp(0, 1)
    return turns / config.rotary_scaling_factor * (1 - stays) + turns * stays, 1.0


SCALINGS: dict[RotaryScaling, Callable[[ModelConfig, float, Tensor], tuple[Tensor, float]]] = {
    "none": _plain,
    "linear": _linear,
    "ntk": _plain,
    "dynamic_ntk": _plain,
    "yarn": _yarn,
    "llama3": _llama3,
}
"""The configuration's ``rotary_scaling`` to what it does with the base and the frequencies."""


class DynamicRotation:
    """Rotation by a base that follows the length (``dynamic_ntk``; emozilla, 2023): a query rotates
    itself and the keys before it by the base of its own length, so keys are stored unrotated.

    Within the trained length that is one rotation for all. Beyond it each query of a chunk is a
    product of its own, which one token at a time costs nothing.
    """

    def __init__(self, config: ModelConfig, base: float, at: Tensor, keys: Tensor) -> None:
        self.config, self.base, self.at, self.keys = config, base, at, keys
        n_query = at.shape[-1]
        self.is_one = n_query == 1 or bool((at < config.rotary_trained_length).all())
        """Whether one rotation serves all queries."""
        self.queries = n_query if self.is_one else 1
        """In one product."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attend: Callable[..., Tensor]
    ) -> Tensor:
        """Attention by ``attend(q, k, v, mask=mask)`` of queries and keys as they are rotated."""
        parts = []
        for start in range(0, q.shape[2], self.queries):
            some = slice(start, start + self.queries)
            at = self.at[..., some]
            turns = self._turns(at[..., -1:] + 1)
            turned = _rotation(at, turns).query(q[:, :, some])
            seen = mask if mask is None or self.is_one else mask[..., some, :]
            parts.append(attend(turned, _rotation(self.keys, turns).key(k), v, mask=seen))
        return torch.cat(parts, dim=2)

    def _turns(self, lengths: Tensor) -> Tensor:
        """As :func:`frequencies`, ``[..., 1, n]`` for ``lengths`` ``[..., 1]``."""
        config, trained = self.config, self.config.rotary_trained_length
        width = 2 * (int(config.head_dim * config.rotary_fraction) // 2)
        factor = config.rotary_scaling_factor
        grown = (factor * lengths / trained - (factor - 1)).clamp(min=1)
        base = self.base * grown ** (width / max(1, width - 2))
        exponents = torch.arange(0, width, 2, device=lengths.device) / width
        return 1.0 / base[..., None] ** exponents


def _rotation(at: Tensor, turns: Tensor) -> Rotation:
    """Of positions ``[T]`` or ``[B, T]`` by ``turns`` ``[1, n]`` or ``[B, 1, n]``."""
    angles = at[..., None] * turns
    angles = angles if angles.ndim == 2 else angles[:, None]
    return Rotation(angles.cos(), angles.sin())
