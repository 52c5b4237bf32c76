"""Initial weights. Each module with its own parameters has a method ``reset``, which gets their
standard deviation from the configuration's scheme.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gpt.config import Initial, ModelConfig

STD = 0.02
Role = Literal["scores", "value", "inner", "out"]
"""The role of a matrix: it computes queries and keys, values, the inner features of a feed-forward
layer, or the output that is added to the residual stream.
"""


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """Draw initial weights for the module and its submodules. A ``reset`` method covers all the
    submodules too. ``TypeError`` for parameters that no ``reset`` covers.
    """
    own = getattr(module, "reset", None)
    if own is not None:
        own()
        return
    if isinstance(module, nn.Linear | nn.Embedding):
        normal(module)
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(module).__name__} has parameters and no reset()")
    for child in module.children():
        reset(child)


@torch.no_grad()
def normal(module: nn.Module, std: float = STD) -> None:
    """Weights of N(0, ``std``), biases of zero."""
    nn.init.normal_(module.get_parameter("weight"), std=std)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)


def table(rows: Tensor) -> nn.Embedding:
    """An embedding of ``rows``. ``nn.Embedding`` itself would draw weights first, which takes a
    second on ``meta``.
    """
    made: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    return made


def std_of(weight: Tensor, role: Role, config: ModelConfig, layer: int) -> float:
    """The standard deviation of a matrix in layer number ``layer``."""
    return INITIALS[config.resolved().initial](role, config, layer, sum(weight.shape))


def draw(module: nn.Linear, role: Role, config: ModelConfig, layer: int) -> None:
    """Initial weights of a linear layer, biases of zero."""
    normal(module, std_of(module.weight, role, config, layer))


def _gpt2(role: Role, config: ModelConfig, layer: int, fans: int) -> float:
    """0.02. Outputs to the residual stream are scaled by ``1 / sqrt(2 n_layer)``, so that its
    variance does not grow with the number of branches (GPT-2).
    """
    return STD / math.sqrt(2 * config.n_layer) if role == "out" else STD


def _depth(role: Role, config: ModelConfig, layer: int, fans: int) -> float:
    """0.02, and outputs scaled by ``1 / sqrt(2 (layer + 1))``, by the layer's depth."""
    return STD / math.sqrt(2 * (layer + 1)) if role == "out" else STD


def _zero(role: Role, config: ModelConfig, layer: int, fans: int) -> float:
    """0.02, and outputs of 0: each block begins as the identity (arXiv:2003.04887)."""
    return 0.0 if role == "out" else STD


def _deepnorm(role: Role, config: ModelConfig, layer: int, fans: int) -> float:
    """Xavier's, times ``(8 n_layer) ** -1/4`` except for queries and keys (arXiv:2203.00555)."""
    gain = 1.0 if role == "scores" else (8 * config.n_layer) ** -0.25
    return gain * math.sqrt(2 / fans)


INITIALS: dict[Initial, Callable[[Role, ModelConfig, int, int], float]] = {
    "gpt2": _gpt2,
    "depth": _depth,
    "zero": _zero,
    "deepnorm": _deepnorm,
}
"""For each ``initial`` of the configuration, a function of a matrix's role, the configuration, its
layer and the sum of its two widths. The result is the standard deviation.
"""
