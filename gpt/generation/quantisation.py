"""Matrices in fewer bits: how each format of :class:`Matrix` lies in memory, and how weights get
there.

======== ====== ==================================================================================
float32  4 B    as they are
bfloat16 2 B    rounded (float16 as well, for older GPUs)
int8     1 B    8 bits, a scale for each output channel
int4     0.63 B 4 bits, a scale and an offset for each 32 inputs of an output channel, fitted by
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
"""The bytes of an int8 or int4 row are those of a multiple of this many weights."""
BLOCK = 1 << 18
"""Weights that are rounded at once: what a processor's cache holds."""
ROUNDS = 6
"""Of the least squares of int4."""


class Matrix(nn.Module):
    """A matrix ``[N, K]`` in one of the formats.

    ``data`` is ``[N, K]`` of float32, bfloat16 or float16. For int8 it is bytes ``[N, P]`` (P is K,
    padded), where ``b`` stands for ``(b - 128) * scales[n]``; each block of 128 stores the first 16
    of its four groups of 32, then their last 16. For int4 it is bytes ``[N, P / 2]``, 16 for the 32
    weights of a group ``g``, the first 16 in the lower halves, where ``b`` stands for
    ``lows[n, g] + b * scales[n, g]``, both bfloat16.
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
        """Of its tensors, which the kernels rely on."""
        return [buffer.dtype for buffer in self.buffers()]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[N, K]``."""
        return self._numbers(self.data, self.scales, self.lows, dtype)

    def numbers(self) -> Tensor:
        """What int8 and int4 store, in the order of the weights: ``[N, P]`` of uint8."""
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
    """Rounding, and the scale and offset that fit the rounded best, in turns; the best of all is
    kept.
    """
    N = len(weight)
    groups = F.pad(weight.float(), (0, -weight.shape[1] % PADDED)).view(N, -1, GROUP)
    mean = groups.mean(dim=2, keepdim=True)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    scale = (high - low) / 15
    least = torch.full_like(low, torch.inf)
    best_steps, best_scale, best_low = torch.zeros_like(groups), scale, low
    for _ in range(ROUNDS):
        scale, low = scale.bfloat16().float(), low.bfloat16().float()
        steps = ((groups - low) / scale.clamp_min(1e-30)).round_().clamp_(0, 15)
        error = (steps * scale).add_(low).sub_(groups).square_().sum(dim=2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_steps = torch.where(better, steps, best_steps)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, low, best_low)
        middle = steps.mean(dim=2, keepdim=True)
        away = steps - middle
        spread = away.square().sum(dim=2, keepdim=True).clamp_min_(1e-30)
        scale = (away * groups).sum(dim=2, keepdim=True) / spread
        low = mean - scale * middle
    first, second = best_steps.to(torch.uint8).split(GROUP // 2, dim=2)
    data = (first | second << 4).reshape(N, -1)
    return data, best_scale.squeeze(2).bfloat16(), best_low.squeeze(2).bfloat16()
