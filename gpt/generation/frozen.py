"""Linear layers whose weights have fewer bits and are frozen, and through which gradients flow: the
base of an adapter (QLoRA, Dettmers et al., 2023, arXiv:2305.14314).

The product dequantises one matrix at a time, forward and again backward, so that only the small
format stays in memory between the two.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import Weights
from gpt.generation.quantisation import Matrix
from gpt.model.adapter import adaptable
from gpt.model.gpt import GPT


class FrozenProduct(torch.autograd.Function):
    """``x @ W.T`` for a :class:`Matrix` ``W``, in ``x``'s dtype; a gradient for ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return x @ matrix.dense(x.dtype).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.matrix.dense(gradient.dtype), None


class FrozenLinear(nn.Module):
    """A linear layer ``[..., K]`` to ``[..., N]`` with a frozen :class:`Matrix`. Its bias keeps its
    name.
    """

    bias: nn.Parameter | None
    is_frozen_linear = True

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.width, len(matrix.data)
        self.matrix = matrix
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product in autocast's dtype, or that of ``x``."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out: Tensor = FrozenProduct.apply(x.to(dtype), self.matrix)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(dtype)


def freeze_matrices(model: GPT, matrices: Mapping[str, Matrix]) -> None:
    """Give the linear layers of the blocks ready matrices, in place, by the names of their
    weights.
    """
    for name, layer in adaptable(model).items():
        if isinstance(layer, nn.Linear):
            frozen = FrozenLinear(matrices[f"{name}.weight"], layer.bias)
            model.set_submodule(name, frozen)


def freeze_rounded(model: GPT, weights: Weights) -> None:
    """Round the linear layers of the blocks to ``weights``, in place, one after the other."""
    for name, layer in adaptable(model).items():
        if isinstance(layer, nn.Linear):
            rounded = Matrix(weights, layer.weight.detach())
            model.set_submodule(name, FrozenLinear(rounded, layer.bias))
            layer.weight = nn.Parameter(torch.empty(0))  # its memory, before the next one


def round_weights(model: GPT, weights: Weights) -> None:
    """Replace the weights of the blocks' linear layers by those that ``weights`` rounds them to.
    An adapter over such a base was trained with these numbers.
    """
    for layer in adaptable(model).values():
        if isinstance(layer, nn.Linear):
            dtype = layer.weight.dtype
            rounded = Matrix(weights, layer.weight.detach()).dense(torch.float32)
            layer.weight = nn.Parameter(rounded.to(dtype))
