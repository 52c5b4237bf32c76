"""The product of features and the head's matrix, for a vocabulary of any size.

A GPU multiplies matrices whose sides are multiples of 64 several times faster, and GPT-2 has 50,257
tokens. So the product has a few more columns than the vocabulary in memory, which nobody else sees.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 64
"""Of which the columns in memory are a multiple."""
ROWS = 1024
"""For fewer rows, copying the matrix takes longer than it saves."""


def apply_head(head: nn.Module, x: Tensor) -> Tensor:
    """``head(x)``, ``[..., C]`` to ``[..., V]``."""
    if type(head) is not nn.Linear or not _is_faster(head.weight, x):
        out: Tensor = head(x)
        return out
    kind, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        logits: Tensor = Aligned.apply(x.to(dtype), head.weight)  # type: ignore[no-untyped-call]
    return logits


def _is_faster(weight: Tensor, x: Tensor) -> bool:
    many = x.numel() >= ROWS * x.shape[-1]
    return x.device.type == "cuda" and many and len(weight) % MULTIPLE != 0


class Aligned(torch.autograd.Function):
    """``x @ weight.T`` in the dtype of ``x``, as a view of the first columns of a wider tensor.

    The columns behind them are 0. A gradient that was written into the product (as by
    :mod:`gpt.training.loss`) is read with them; any other one is copied.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out = x @ _padded(weight, x.dtype).T
        ctx.save_for_backward(x, weight)
        ctx.memory, ctx.columns = out.untyped_storage()._cdata, out.shape[-1]
        return out[..., : len(weight)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows, n = gradient.flatten(0, -2), ctx.columns
        if rows.untyped_storage()._cdata == ctx.memory and rows.stride() == (n, 1):
            rows = rows.as_strided((len(rows), n), (n, 1))
        else:
            rows = F.pad(rows, (0, n - len(weight)))
        to_x = rows @ _padded(weight, x.dtype)
        to_weight = (rows.T @ x.flatten(0, -2))[: len(weight)]
        return to_x.view_as(x), to_weight.to(weight.dtype)


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with rows of zeros behind it, in one copy."""
    V, C = weight.shape
    padded = weight.new_zeros(V + -V % MULTIPLE, C, dtype=dtype)
    padded[:V] = weight
    return padded
