"""Layers whose weights are a :class:`gpt.generation.quantisation.Matrix`."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import kernels
from gpt.generation.quantisation import Matrix
from gpt.generation.torch_products import TorchProduct

FEW = 32
"""The kernels are faster than matrix products up to this many tokens of a prompt, and up to twice
as many rows with one token each.
"""


class PackedLinear(nn.Module):
    """A linear layer with a :class:`Matrix`. Up to ``few`` rows use the kernels; more rows use a
    matrix product of the dtype ``wide``.
    """

    bias: Tensor | None

    def __init__(self, matrix: Matrix, bias: Tensor | None, wide: torch.dtype, few: int) -> None:
        super().__init__()
        self.matrix, self.wide, self.few = matrix, wide, few
        kept = torch.float32 if few else wide  # for the kernels, or for the matrix product
        self.register_buffer("bias", None if bias is None else bias.detach().to(kept))
        self._raw: kernels.RawMatrix | None = None
        self._product: TorchProduct | None = None
        self._dense: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The matrix ``[N, K]`` in the dtype ``wide``. It is kept if every product needs it:
        without kernels, on a processor that only emulates the weights' dtype.
        """
        if self._dense is not None:
            return self._dense
        dense = self.matrix.dense(self.wide)
        if not self.few and dense.device.type == "cpu" and self.matrix.scales is None:
            self._dense = dense
        return dense

    @property
    def raw(self) -> kernels.RawMatrix:
        """The matrix for the kernels, described once."""
        if self._raw is None:
            self._raw = self.described()
        return self._raw

    def described(self) -> kernels.RawMatrix:
        """The matrix for the kernels, with the present addresses of its tensors."""
        m = self.matrix
        return kernels.RawMatrix(m.kind, m.width, m.data, m.scales, m.lows, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; float32 if the kernels compute it, else ``x``'s dtype."""
        if x.numel() <= self.few * self.matrix.width:
            return kernels.linear(x.float(), self.raw)
        if x.is_cuda and self.matrix.scales is not None:
            from gpt import triton_kernels

            if x.numel() <= triton_kernels.FEW * self.matrix.width:
                m = self.matrix
                y: Tensor = triton_kernels.linear(x, m.data, m.scales, m.lows, m.width, self.bias)
                return y
        few_rows = x.numel() <= FEW * self.matrix.width
        if not self.few and x.device.type == "cpu" and few_rows and self.matrix.scales is not None:
            if self._product is None:
                self._product = TorchProduct(self.matrix)
            y = self._product(x)
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.wide)
        return F.linear(x.to(self.wide), self.weight, bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._raw = self._product = self._dense = None  # they have the old addresses
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_raw": None, "_product": None, "_dense": None}


class PackedEmbedding(nn.Module):
    """An embedding with a :class:`Matrix`. A few tokens give float32, more give ``wide``."""

    def __init__(self, matrix: Matrix, wide: torch.dtype, few: int) -> None:
        super().__init__()
        self.matrix, self.wide, self.few = matrix, wide, few

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., C]``."""
        few = ids.numel() <= self.few
        return self.matrix.rows(ids, torch.float32 if few else self.wide)
