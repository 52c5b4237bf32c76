"""Matrices with fewer bits: the memory layout of each format, and the conversion to it.

========= ====== =================================================================================
float32   4 B    unchanged
bfloat16  2 B    rounded; also float16, for older GPUs
int8      1 B    8 bits; a scale for each output channel
int4      0.63 B 4 bits; a scale and an offset for each 32 inputs of an output channel, fitted by
                 least squares
int8_gguf 1.06 B the numbers of a GGUF file's Q8_0: 8 bits; a float16 scale for each 32 inputs
int4_gguf 0.63 B those of Q4_0 and Q4_1: 4 bits; a float16 scale and offset for each 32 inputs
========= ====== =================================================================================

Weights are rounded to the first four formats. The last two hold the numbers of a file's blocks, and
nothing is rounded again (:meth:`Matrix.of_blocks`).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import kernels
from gpt.config import UsageError, Weights
from gpt.kernels import GROUP, PACKED

CHUNK = 128
"""Weights of int8 whose bytes are interleaved; rows of int8 and int4 are padded to a multiple."""
Format = Weights | Literal["int8_gguf", "int4_gguf"]
BLOCK = 1 << 18
"""Weights that are rounded at a time, so that they fit into a processor's cache."""
ROUNDS = 6
"""Rounds of the least squares of int4."""


class FileBlock(NamedTuple):
    """A block of 32 weights in a GGUF file (llama.cpp, ggml/src/ggml-common.h)."""

    bytes: int
    kind: Format
    start: int
    """Where the weights' bytes start; before them are float16 numbers, the scale first."""


GGUF_BLOCKS = {
    "Q8_0": FileBlock(34, "int8_gguf", 2),
    "Q4_0": FileBlock(18, "int4_gguf", 2),
    "Q4_1": FileBlock(20, "int4_gguf", 4),
}
"""The types of blocks that a format holds exactly."""


class Matrix(nn.Module):
    """A matrix ``[N, K]`` in one of the formats.

    float32, bfloat16, float16: ``data`` is ``[N, K]``.

    int8: ``data`` is bytes ``[N, P]``, and P is K, padded to whole chunks. Byte ``b`` is the weight
    ``(b - 128) * scales[n]``. A chunk of 128 weights has four groups of 32. It stores the first 16
    weights of each group, then the last 16 of each.

    int4: ``data`` is bytes ``[N, P / 2]``, 16 bytes for each group ``g`` of 32 weights. The lower 4
    bits are the first 16 weights, the upper 4 bits the last 16. Bits ``b`` are the weight
    ``lows[n, g] + b * scales[n, g]``; ``lows`` and ``scales`` are bfloat16.

    int8_gguf, int4_gguf: the same layouts without padding, so the last chunk of int8_gguf may have
    fewer groups. K is a multiple of 32. ``scales`` of both and ``lows`` of int4_gguf are float16
    ``[N, K / 32]``.
    """

    data: Tensor
    scales: Tensor | None
    lows: Tensor | None

    def __init__(self, kind: Weights, weight: Tensor) -> None:
        """Convert ``weight`` ``[N, K]`` to the format ``kind``."""
        pack = {"int8": _int8, "int4": _int4}.get(kind)
        scales: Tensor | None = None
        lows: Tensor | None = None
        if pack is None:
            data = weight.to(getattr(torch, kind)).contiguous()
        else:
            rows = max(1, BLOCK // weight.shape[1])
            parts = zip(*map(pack, weight.detach().split(rows)), strict=True)
            data, scales, lows = (torch.cat(part) for part in parts)
        self._hold(kind, weight.shape[1], data, scales, lows if kind == "int4" else None)

    @classmethod
    def of_tensors(
        cls, kind: Format, width: int, data: Tensor, scales: Tensor | None, lows: Tensor | None
    ) -> "Matrix":
        """A matrix of K = ``width`` inputs whose tensors have the layout of ``kind`` already;
        ``ValueError`` if they have not.
        """
        packed, N = PACKED.get(kind), len(data)
        needs: list[tuple[torch.dtype, tuple[int, ...]] | None]
        if packed is None:
            needs = [(getattr(torch, kind), (N, width)), None, None]
        else:
            per_row = packed.scales, (N, *packed.row_scales(width))
            needs = [(torch.uint8, (N, packed.row_bytes(width))), per_row]
            needs.append(per_row if packed.has_lows else None)
        has = [t if t is None else (t.dtype, tuple(t.shape)) for t in (data, scales, lows)]
        if has != needs:
            raise ValueError(f"{kind} of {width} inputs needs the tensors {needs}, and has {has}")
        matrix = cls.__new__(cls)
        matrix._hold(kind, width, data, scales, lows)
        return matrix

    @classmethod
    def empty(cls, kind: Format, rows: int, width: int, device: torch.device | str) -> "Matrix":
        """A matrix ``[rows, width]`` of a format of integers, without numbers."""
        packed = PACKED[kind]
        data = torch.empty(rows, packed.row_bytes(width), dtype=torch.uint8, device=device)
        shape = rows, *packed.row_scales(width)
        scales, lows = (torch.empty(shape, dtype=packed.scales, device=device) for _ in range(2))
        return cls.of_tensors(kind, width, data, scales, lows if packed.has_lows else None)

    @classmethod
    def of_blocks(cls, kind: str, blocks: Tensor) -> "Matrix":
        """The matrix ``[N, K]`` of a GGUF file's blocks. ``kind`` is a key of :data:`GGUF_BLOCKS`,
        and ``blocks`` are the file's bytes, uint8 ``[N, K / 32, 18, 20 or 34]``.

        Every weight is the file's own number. The bytes are copied once. ``UsageError`` if a scale
        of Q4_0 is above 8,188: its offset of -8 scales is no float16.
        """
        block = GGUF_BLOCKS[kind]
        N, G = blocks.shape[:2]
        if blocks.dtype != torch.uint8 or blocks.shape != (N, G, block.bytes):
            raise ValueError(
                f"{kind} takes uint8 [N, K / 32, {block.bytes}], not {blocks.dtype} "
                f"{[*blocks.shape]}"
            )
        numbers = blocks[..., : block.start].contiguous().view(torch.float16)
        scales, lows = numbers[..., 0].contiguous(), None
        if kind == "Q4_0":
            lows = scales * -8
            if not torch.equal(lows.isfinite(), scales.isfinite()):
                raise UsageError("a scale of Q4_0 is above 8,188; convert the matrix to float32")
        elif kind == "Q4_1":
            lows = numbers[..., 1].contiguous()
        weights = blocks[..., block.start :]
        if PACKED[block.kind].bits == 4:
            data = weights.reshape(N, -1).contiguous()  # of one group, reshape gives a view
        else:
            data = _interleaved(weights.unflatten(2, (2, GROUP // 2))).bitwise_xor_(128)
        return cls.of_tensors(block.kind, G * GROUP, data, scales, lows)

    def _hold(
        self, kind: Format, width: int, data: Tensor, scales: Tensor | None, lows: Tensor | None
    ) -> None:
        super().__init__()
        self.kind, self.width = kind, width
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
        """The stored numbers of a format of integers in the order of the weights: ``[N, P]`` of
        uint8.
        """
        return _in_order(self.data, PACKED[self.kind].bits)

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
        numbers = _in_order(data, PACKED[self.kind].bits).to(torch.float32)
        if lows is None:
            numbers -= 128
        per_group = scales.view(len(data), -1, 1).float()
        groups = numbers.view(len(data), per_group.shape[1], -1) * per_group
        if lows is not None:
            groups += lows[:, :, None]
        return groups.flatten(1)[:, : self.width].to(dtype)


def _interleaved(groups: Tensor) -> Tensor:
    """Groups ``[N, G, 2, 16]`` of bytes, as int8 stores them: ``[N, 32 G]``, in chunks of up to
    four groups the first halves, then the second ones.
    """
    N, G = groups.shape[:2]
    out = torch.empty(N, G * GROUP, dtype=torch.uint8, device=groups.device)
    for mine, its in zip(_chunks(out), groups.split(G - G % 4 or G, dim=1), strict=True):
        mine.copy_(its.unflatten(1, (-1, mine.shape[3])).transpose(2, 3))
    return out


def _chunks(data: Tensor) -> list[Tensor]:
    """Views ``[N, chunks, 2, groups, 16]`` of the bytes of int8: whole chunks, then a rest."""
    G = data.shape[1] // GROUP
    parts = data.split((G - G % 4 or G) * GROUP, dim=1)
    return [
        part.unflatten(1, (-1, 2, min(4, part.shape[1] // GROUP), GROUP // 2)) for part in parts
    ]


def _in_order(data: Tensor, bits: int) -> Tensor:
    """The bytes of int8, or the 4 bits of int4, in the order of the weights: ``[N, P]``."""
    if bits == 8:
        parts = [chunks.transpose(2, 3).flatten(1) for chunks in _chunks(data)]
        return torch.cat(parts, dim=1)
    pairs = data.view(len(data), -1, GROUP // 2)
    return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = (weight.float().abs().amax(dim=1) / 127).clamp_min_(1e-30)
    numbers = (weight.float() / scales[:, None]).round_().add_(128)
    data = F.pad(numbers, (0, -weight.shape[1] % CHUNK), value=128).to(torch.uint8)
    return _interleaved(data.unflatten(1, (-1, 2, GROUP // 2))), scales, scales


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In turns, round the weights, and fit scale and offset to the rounded weights by least
    squares. Keep the round with the smallest error.
    """
    N = len(weight)
    groups = F.pad(weight.float(), (0, -weight.shape[1] % CHUNK)).view(N, -1, GROUP)
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
