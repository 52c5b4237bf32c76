"""The feed-forward half of a block: up to four times the width, an activation, and down again."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import Activation, Mlp, ModelConfig
from gpt.model.initial import STD, normal


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU (arXiv:1606.08415) as GPT-2 computes it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class MLP(nn.Module):
    """GPT-2's feed-forward layer, applied to every position alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.resolved().n_inner
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)
        self.residual_std = STD / math.sqrt(2 * config.n_layer)

    def reset(self) -> None:
        """As :meth:`gpt.model.attention.CausalSelfAttention.reset`."""
        normal(self.up)
        normal(self.down, self.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


MLPS: dict[Mlp, Callable[[ModelConfig], nn.Module]] = {"plain": MLP}
"""The configuration's ``mlp`` to what makes one."""
