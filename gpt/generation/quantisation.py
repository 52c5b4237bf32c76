"""Matrices with fewer bits: the memory layout of each format, and the conversion to it.

======== ====== ==================================================================================
float32  4 B    unchanged
bfloat16 2 B    rounded; also float16, for older GPUs
int8     1 B    8 bits; a scale for each output channel
int4     0.63 B 4 bits; a scale and an offset for each 32 inputs of an output channel, fitted by
                least squares
======== ====== ==================================================================================
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import kernels
from gpt.config import Weights

GROUP = 32
"""Inputs of an output channel that share a scale and an offset in int4."""
PADDED = 128
"""Rows of int8 and int4 are padded to a multiple of this many weights."""
BLOCK = 1 << 18
"""Weights that are rounded at a time, so that they fit into a processor's cache."""
ROUNDS = 6
"""Rounds of the least squares of int4."""


class Matrix(nn.Module):
    """A matrix ``[N, K]`` in one of the formats.

    float32, bfloat16, float16: ``data`` is ``[N, K]``.

    int8: ``data`` is bytes ``[N, P]``, and P is K, padded. Byte ``b`` is the weight
    ``(b - 128) * scales[n]``. A block of 128 weights has four groups of 32. It stores the first 16
    weights of each group, then the last 16 of each.

    int4: ``data`` is bytes ``[N, P / 2]``, 16 bytes for each group ``g`` of 32 weights. The lower 4
    bits are the first 16 weights, the upper 4 bits the last 16. Bits ``b`` are the weight
    ``lows[n, g] + b * scales[n, g]``; ``lows`` and ``scales`` are bfloat16.
    """

    data: Tensor
    scales: Tensor | None
    lows: Tensor | None

    def __init__(self, kind: Weights, weight: Tensor) -> None:
        super().__init__()
        self.kind, self.width = kind, weight.shape[1]
        pack = {"int8": _int8, "int4": _int4}.get(kind)
        scales: Tensor | None
        lows: Tensor | None
        if pack is None:
            data, scales, lows = weight.to(getattr(torch, kind)).contiguous(), None, None
        else:
            rows = max(1, BLOCK // self.width)
            parts = zip(*map(pack, weight.detach().split(rows)), strict=True)
            data, scales, lows = (torch.cat(part) for part in parts)
            lows = lows if kind == "int4" else None
        self.register_buffer("data", data)
        self.register_buffer("scales", scales)
        self.register_buffer("lows", lows)
        self.has_dtypes = self.dtypes()

    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of the tensors. The kernels need these."""
        return [buffer.dtype for buffer in self.buffers()]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix ``[N, K]`` in ``dtype``."""
        return self._numbers(self.data, self.scales, self.lows, dtype)

    def numbers(self) -> Tensor:
        """The stored numbers of int8 or int4 in the order of the weights: ``[N, P]`` of uint8."""
        return _in_order(self.data, self.lows)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` ``[...]`` as ``[..., K]``."""
        if self.scales is None:
            return F.embedding(ids, self.data).to(dtype)
        flat = ids.flatten()
        data, scales = self.data.index_select(0, flat), self.scales.index_select(0, flat)
        lows = None if self.lows is None else self.lows.index_select(0, flat)
        rows = self._numbers(data, scales, lows, dtype)
        return rows.view(*ids.shape, self.width)

    def _numbers(
        self, data: Tensor, scales: Tensor | None, lows: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if scales is None:
            return data.to(dtype)
        known = dtype in (torch.float32, torch.bfloat16)
        if known and data.device.type == "cpu" and kernels.library() is not None:
            return kernels.dense(
                kernels.RawMatrix(self.kind, self.width, data, scales, lows), dtype
            )
        if data.is_cuda:
            from gpt import triton_kernels

            dense: Tensor = triton_kernels.dense(data, scales, lows, self.width, dtype)
            return dense
        numbers = _in_order(data, lows).to(torch.float32)
        if lows is None:
            numbers = (numbers - 128) * scales[:, None]
        else:
            groups = numbers.view(len(data), -1, GROUP)
            numbers = (groups * scales[:, :, None] + lows[:, :, None]).flatten(1)
        return numbers[:, : self.width].to(dtype)


def _in_order(data: Tensor, lows: Tensor | None) -> Tensor:
    """The bytes of int8, or the 4 bits of int4, in the order of the weights: ``[N, P]``."""
    if lows is None:
        halves = data.view(len(data), -1, 2, PADDED // GROUP, GROUP // 2).transpose(2, 3)
        return halves.reshape(len(data), -1)
    pairs = data.view(len(data), -1, GROUP // 2)
    return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = (weight.float().abs().amax(dim=1) / 127).clamp_min_(1e-30)
    numbers = (weight.float() / scales[:, None]).round_().add_(128)
    data = F.pad(numbers, (0, -weight.shape[1] % PADDED), value=128).to(torch.uint8)
    data = data.view(len(data), -1, PADDED // GROUP, 2, GROUP // 2).transpose(2, 3)
    return data.reshape(len(data), -1), scales, scales


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In turns, round the weights, and fit scale and offset to the rounded weights by least
    squares. Keep the round with the smallest error.
    """
    N = len(weight)
    groups = F.pad(weight.float(), (0, -weight.shape[1] % PADDED)).view(N, -1, GROUP)
    mean = groups.mean(dim=2, keepdim=True)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    scale = (high - low) / 15
    least = torch.full_like(low, torch.inf)
    best_levels, best_scale, best_low = torch.zeros_like(groups), scale, low
    for _ in range(ROUNDS):
        scale, low = scale.bfloat16().float(), low.bfloat16().float()
        levels = ((groups - low) / scale.clamp_min(1e-30)).round_().clamp_(0, 15)
        error = (levels * scale).add_(low).sub_(groups).square_().sum(dim=2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_levels = torch.where(better, levels, best_levels)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, low, best_low)
        middle = levels.mean(dim=2, keepdim=True)
        away = levels - middle
        spread = away.square().sum(dim=2, keepdim=True).clamp_min_(1e-30)
        scale = (away * groups).sum(dim=2, keepdim=True) / spread
        low = mean - scale * middle
    first, second = best_levels.to(torch.uint8).split(GROUP // 2, dim=2)
    data = (first | second << 4).reshape(N, -1)
    return data, best_scale.squeeze(2).bfloat16(), best_low.squeeze(2).bfloat16()
