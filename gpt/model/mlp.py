"""The feed-forward half of a block: up to an inner width, an activation, and down again."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import training_kernels
from gpt.config import Activation, Mlp, ModelConfig
from gpt.model.initial import draw


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU (arXiv:1606.08415) as GPT-2 computes it."""
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    """The square of ReLU (Primer, arXiv:2109.08668)."""
    if training_kernels.takes(x):
        return training_kernels.relu_squared(x)
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class MLP(nn.Module):
    """GPT-2's feed-forward layer, applied to every position alone."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        resolved = config.resolved()
        width, has_bias = resolved.n_inner, resolved.mlp_bias == "yes"
        self.config, self.layer = config, layer
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.n_embd, width, bias=has_bias)
        self.down = nn.Linear(width, config.n_embd, bias=has_bias)

    def reset(self) -> None:
        """As ``config.initial`` says (:mod:`gpt.model.initial`)."""
        draw(self.up, "inner", self.config, self.layer)
        draw(self.down, "out", self.config, self.layer)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class GatedMLP(MLP):
    """A feed-forward layer whose inner numbers are multiplied by gates (Shazeer, 2020,
    arXiv:2002.05202): SwiGLU with ``silu``, GeGLU with ``gelu``, ReGLU with ``relu``.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.gate = nn.Linear(config.n_embd, self.up.out_features, bias=self.up.bias is not None)

    def reset(self) -> None:
        """As :meth:`MLP.reset`."""
        super().reset()
        draw(self.gate, "inner", self.config, self.layer)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


MLPS: dict[Mlp, Callable[[ModelConfig, int], nn.Module]] = {"plain": MLP, "gated": GatedMLP}
"""The configuration's ``mlp`` to what makes one for a layer."""
