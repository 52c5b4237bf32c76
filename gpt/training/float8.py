"""Linear layers whose products are computed in float8 (arXiv:2209.05433), as newer GPUs do at twice
the rate of bfloat16.

The forward product is in e4m3, which has more precision. In the backward products the gradient of
the output is in e5m2, which has more range. Each tensor has one scale, chosen anew in each pass,
which maps its largest magnitude to the largest number of the format. Parameters, their gradients
and the optimizer's state keep their dtypes, and checkpoints their keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.config import UsageError
from gpt.model.gpt import GPT

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""A GPU's float8 product needs matrices whose sides are multiples of this."""
CAPABILITY = 8, 9
"""The lowest CUDA capability with float8 products."""


class Float8Linear(nn.Linear):
    """``nn.Linear`` with float8 products in training. In evaluation its products are as usual."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, in autocast's dtype or that of ``x``."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y: Tensor = _Products.apply(x.flatten(0, -2), self.weight, dtype)  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y + self.bias.to(dtype)
        out: Tensor = y.unflatten(0, x.shape[:-1])
        return out


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        (x8, x_scale), (weight8, weight_scale) = _rounded(x, FORWARD), _rounded(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, weight8.t(), x_scale, weight_scale, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        (slope8, scale), of_x, of_weight = _rounded(slope, GRADIENT), None, None
        if ctx.needs_input_grad[0]:
            of_x = _product(slope8, _by_columns(weight8), scale, weight_scale, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            turned = slope8.t().contiguous()
            of_weight = _product(turned, _by_columns(x8), scale, x_scale, ctx.dtypes[1])
        return of_x, of_weight, None


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` over its scale, rounded to ``dtype`` and contiguous; and the scale."""
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).contiguous(), scale


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix in column-major order, which the right factor must have."""
    return x.t().contiguous().t()


def _product(a: Tensor, b: Tensor, scale: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    whole = F.ScalingType.TensorWise
    return F.scaled_mm(a, b, scale, whole, other, whole, output_dtype=dtype)


def use_float8(model: GPT, *, device: torch.device) -> None:
    """Replace the blocks' linear layers by :class:`Float8Linear`, in place. The head keeps its
    precision, and so do a router, the experts that it chooses (their number of rows varies), and
    layers with a side that is not a multiple of 16. ``UsageError`` if torch, the device, the
    context or every layer is unsuitable.
    """
    if not hasattr(F, "scaled_mm"):
        raise UsageError(
            f"training.float8 is true, and torch {torch.__version__} has no "
            "torch.nn.functional.scaled_mm; a newer torch has it"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UsageError(
            f"training.float8 is true, and needs a GPU of CUDA capability 8.9 or higher (Ada, "
            f"Hopper and newer); the device is {device}"
        )
    length = model.config.context_length
    if length % MULTIPLE:
        raise UsageError(
            f"training.float8 is true, and model.context_length is {length}, which must be a "
            f"multiple of {MULTIPLE}"
        )
    if not convert(model):
        raise UsageError(
            f"training.float8 is true, and no linear layer of the blocks has sides that are "
            f"multiples of {MULTIPLE}"
        )


def convert(model: GPT) -> int:
    """As :func:`use_float8`, on any device: a CPU computes the same numbers slowly. Returns the
    number of layers.
    """
    layers = [
        layer
        for name, layer in model.blocks.named_modules()
        if type(layer) is nn.Linear
        and not (name.endswith("router") or ".experts." in name)
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    ]
    for layer in layers:
        layer.__class__ = Float8Linear
    return len(layers)
