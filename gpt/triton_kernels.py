"""Products with int8 and int4 matrices on a GPU, in Triton: each packed byte is read once, and no
wider copy of the matrix is written.

:mod:`gpt.generation.quantisation` describes the memory layout of a matrix. In both formats, the 32
weights of a group are two halves of 16. In int8, the second 16 bytes begin 64 bytes after the
first; in int4, the halves are the lower and the upper bits of the same 16 bytes. A program computes
some rows of the matrix, and reads some groups of them at a time. It sums in float32 and in a fixed
order, so the same product has the same bits. Block sizes depend only on shapes: nothing is tuned at
run time, and CUDA graphs can capture the kernels.

Torch's own operators are not used, for these reasons. In ``_weight_int8pack_mm`` on CUDA, one
thread computes each number of the product and reads a whole row of the matrix: its loads are not
coalesced. ``_weight_int4pack_mm`` takes only bfloat16, on Ampere or newer; K must be a multiple of
its tiles, and callers must pad N to a multiple of 8 (GPT-2 has 50257 tokens). Both need another
order of the bytes, so packed folders would need one layout for CPUs and one for GPUs.

This module imports Triton, so callers import it only when they have a matrix on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 32
"""The most rows of activations that :func:`linear` takes. For more, use a product with
:func:`dense`.
"""
WARPS = 4
"""Warps of each program. :func:`_some_rows` divides the inputs among them."""
LARGE = 8192
"""From this many rows of a matrix on, a program computes more rows: the programs still fill a GPU.
"""


@triton.jit
def _weights(data, scales, lows, rows, groups, N, K):
    """The first and second halves of ``groups`` ``[G]`` in ``rows`` ``[R]``: two tiles
    ``[R, G, 16]`` of float32, zeros outside the matrix. For int8, the caller multiplies by the
    row's scale.
    """
    blocks = tl.cdiv(K, 128)  # rows are padded to whole blocks of 128 weights
    n, g = rows.to(tl.int64)[:, None], groups[None, :]
    inside = (n < N) & (g < 4 * blocks)
    i = tl.arange(0, 16)[None, None, :]
    if lows is not None:
        address = (data + n * (64 * blocks) + g * 16)[:, :, None] + i
        pairs = tl.load(address, mask=inside[:, :, None], other=0)
        # Load [R, G], not [R, G, 1]: with the latter, the compiler moves whole tiles through
        # shared memory.
        group = n * (4 * blocks) + g
        scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)[:, :, None]
        low = tl.load(lows + group, mask=inside, other=0).to(tl.float32)[:, :, None]
        first = (pairs & 15).to(tl.float32) * scale + low
        second = (pairs >> 4).to(tl.float32) * scale + low
    else:
        address = (data + n * (128 * blocks) + g // 4 * 128 + g % 4 * 16)[:, :, None] + i
        first = tl.load(address, mask=inside[:, :, None], other=128).to(tl.float32) - 128
        second = tl.load(address + 64, mask=inside[:, :, None], other=128).to(tl.float32) - 128
    return first, second


@triton.jit
def _one_row(x, data, scales, lows, rows, N, K, R: tl.constexpr, G: tl.constexpr):
    """The product of one row of activations, ``[1, R]``, without matrix units."""
    total = tl.zeros((R, G), tl.float32)
    for start in range(0, tl.cdiv(K, 32), G):
        groups = start + tl.arange(0, G)
        first, second = _weights(data, scales, lows, rows, groups, N, K)
        k = groups[:, None] * 32 + tl.arange(0, 16)[None, :]
        x_first = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        x_second = tl.load(x + k + 16, mask=k + 16 < K, other=0).to(tl.float32)
        total += tl.sum(first * x_first[None] + second * x_second[None], axis=2)
    return tl.sum(total, axis=1)[None, :]


@triton.jit
def _some_rows(
    x, data, scales, lows, rows, M, N, K, PRECISION: tl.constexpr,
    TILE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The product of up to ``TILE`` rows of activations, ``[TILE, R]``, with matrix units.

    The tile of the product is too small to be divided among warps, so each warp takes a part of
    the inputs. This is a batched product; its parts are added at the end.
    """
    PART: tl.constexpr = G * 16 // WARPS
    total = tl.zeros((WARPS, TILE, R), tl.float32)
    for start in range(0, tl.cdiv(K, 32), G):
        groups = start + tl.arange(0, G)
        first, second = _weights(data, scales, lows, rows, groups, N, K)
        half = tl.arange(0, WARPS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
        k = (start + half // 16) * 32 + half % 16
        m = tl.arange(0, TILE)[None, :, None]
        x_first = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0)
        x_second = tl.load(x + m * K + k + 16, mask=(m < M) & (k + 16 < K), other=0)
        # The weights are rounded as `dense` rounds them. bfloat16 and float16 are exact in TF32,
        # and Triton's interpreter, which the tests use, has no products of bfloat16.
        first = first.to(x_first.dtype).to(tl.float32).reshape(R, WARPS, PART).permute(1, 2, 0)
        second = second.to(x_first.dtype).to(tl.float32).reshape(R, WARPS, PART).permute(1, 2, 0)
        total = tl.dot(x_first.to(tl.float32), first, total, input_precision=PRECISION)
        total = tl.dot(x_second.to(tl.float32), second, total, input_precision=PRECISION)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["M", "N"])
def _linear(
    x, data, scales, lows, bias, y, M, N, K, PRECISION: tl.constexpr,
    TILE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    if TILE == 1:
        total = _one_row(x, data, scales, lows, rows, N, K, R, G)
    else:
        total = _some_rows(x, data, scales, lows, rows, M, N, K, PRECISION, TILE, R, G, WARPS)
    n, m = rows[None, :], tl.arange(0, TILE)[:, None]
    if lows is None:
        total *= tl.load(scales + n, mask=n < N, other=0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0)
    tl.store(y + m * N + n, total, mask=(m < M) & (n < N))


@triton.jit(do_not_specialize=["N"])
def _dense(data, scales, lows, out, N, K, R: tl.constexpr, G: tl.constexpr):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    groups = tl.program_id(1) * G + tl.arange(0, G)
    first, second = _weights(data, scales, lows, rows, groups, N, K)
    n = rows.to(tl.int64)[:, None, None]
    if lows is None:
        scale = tl.load(scales + rows, mask=rows < N, other=0)[:, None, None]
        first *= scale
        second *= scale
    k = groups[None, :, None] * 32 + tl.arange(0, 16)[None, None, :]
    tl.store(out + n * K + k, first, mask=(n < N) & (k < K))
    tl.store(out + n * K + k + 16, second, mask=(n < N) & (k + 16 < K))


@torch.library.custom_op("gpt::packed_linear", mutates_args=())
def linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    lows: Tensor | None,
    width: int,
    bias: Tensor | None,
) -> Tensor:
    """``x`` ``[..., K]`` of float32, bfloat16 or float16 times the matrix ``[N, K]``, plus ``bias``
    ``[N]`` of float32: ``[..., N]`` of ``x``'s dtype.

    ``data``, ``scales`` and ``lows`` are the tensors of an int8 matrix, which has no ``lows``, or
    of an int4 matrix; ``width`` is K. ``ValueError`` for more than :data:`FEW` rows.
    """
    N, M = len(data), x.numel() // width
    if M > FEW:
        raise ValueError(f"the kernel takes up to {FEW} rows of activations, not {M}")
    y = x.new_empty(*x.shape[:-1], N)
    if M == 1:
        # A thread computes whole groups, so that it loads 16 bytes at once, and several rows, so
        # that it loads activations once for them. A matrix with few rows needs more programs.
        tile, G = 1, min(128, triton.next_power_of_2(triton.cdiv(width, 32)))
        R = 4 if N < LARGE else min(16, 512 // G)
    else:
        tile, G, R = 16 if M <= 16 else 32, 8, 8 if N < LARGE else 16
    if M:
        precision = "ieee" if x.dtype == torch.float32 else "tf32"
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _linear[(triton.cdiv(N, R),)](
                x.contiguous(), data, scales, lows, bias, y, M, N, width, precision, tile, R, G,
                WARPS, num_warps=WARPS,
            )  # fmt: skip
    return y


@linear.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    lows: Tensor | None,
    width: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(data))


@torch.library.custom_op("gpt::packed_dense", mutates_args=())
def dense(
    data: Tensor, scales: Tensor, lows: Tensor | None, width: int, dtype: torch.dtype
) -> Tensor:
    """The matrix as ``[N, K]`` of ``dtype``: float32, bfloat16 or float16."""
    N, R, G = len(data), 4, 32
    out = data.new_empty(N, width, dtype=dtype)
    if N:
        grid = triton.cdiv(N, R), triton.cdiv(width, 32 * G)
        with torch.cuda.device_of(data):
            _dense[grid](data, scales, lows, out, N, width, R, G, num_warps=WARPS)
    return out


@dense.register_fake
def _(data: Tensor, scales: Tensor, lows: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(len(data), width, dtype=dtype)
