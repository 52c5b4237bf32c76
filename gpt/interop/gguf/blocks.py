"""Numbers of GGUF's tensors: blocks of bytes to float32, and back.

Reference: ggml's ``ggml-quants.c``. The K formats and the 5-bit formats are read by the package
``gguf``.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import UsageError
from gpt.generation.quantisation import Matrix
from gpt.kernels import GROUP

Bytes = NDArray[np.uint8]
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Formats that torch has."""
_LARGEST = 65504.0
"""Of float16."""


def dequantised(form: str, rows: Bytes) -> Tensor:
    """Rows of a tensor, ``[N, bytes of a row]``, as float32 or their own dtype ``[N, K]``."""
    N = len(rows)
    if form in _PLAIN:
        return torch.from_numpy(rows).view(_PLAIN[form])
    if form not in ("Q8_0", "Q4_0", "Q4_1"):
        return torch.from_numpy(_by_package(form, rows))
    blocks = torch.from_numpy(rows).view(N, -1, {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[form])
    scale = blocks[:, :, :2].contiguous().view(torch.float16).float()
    if form == "Q8_0":
        return (blocks[:, :, 2:].view(torch.int8).float() * scale).flatten(1)
    levels = blocks[:, :, -GROUP // 2 :]
    numbers = torch.cat([levels & 15, levels >> 4], dim=2).float()
    if form == "Q4_0":
        return ((numbers - 8) * scale).flatten(1)
    low = blocks[:, :, 2:4].contiguous().view(torch.float16).float()
    return (numbers * scale + low).flatten(1)


def _by_package(form: str, rows: Bytes) -> NDArray[np.float32]:
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UsageError(
            f"its weights are {form}, which the package gguf reads: pip install gguf"
        ) from None
    with np.errstate(all="ignore"):  # the scales of a damaged file may be infinite
        numbers: NDArray[np.float32] = dequantize(rows, GGMLQuantizationType[form])
    return numbers


def quantised(form: str, weight: Tensor) -> Bytes:
    """A matrix ``[N, K]`` as the bytes of its rows, ``[N, bytes of a row]``; K is a multiple of 32
    for Q8_0 and Q4_1. ``UsageError`` for numbers that float16 cannot hold.
    """
    if form in _PLAIN:
        plain = weight.to(_PLAIN[form]).contiguous()
        if form == "F16" and weight.abs().max() > _LARGEST:
            raise UsageError(
                f"weights float16 are at most {_LARGEST:,.0f}, and the model has larger ones; "
                "choose bfloat16"
            )
        return plain.view(torch.uint8).view(len(plain), -1).numpy()
    scales, rest = _q8_0(weight) if form == "Q8_0" else _q4_1(weight)
    if not scales.isfinite().all():
        raise UsageError(f"the model has weights that {form} cannot hold; choose bfloat16")
    parts = [scales.view(len(weight), -1, scales.shape[-1]).view(torch.uint8), rest]
    return torch.cat(parts, dim=2).flatten(1).numpy()


def _q8_0(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scales, float16 ``[N, K / 32, 1]``, and bytes ``[N, K / 32, 32]``."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(dim=2, keepdim=True) / 127).half()
    levels = (groups / scales.float().clamp_min(1e-30)).round_().clamp_(-127, 127)
    return scales, levels.to(torch.int8).view(torch.uint8)


def _q4_1(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and lows, float16 ``[N, K / 32, 2]``, and bytes ``[N, K / 32, 16]``: the numbers of
    this project's int4, fitted by least squares. Its bfloat16 scales are float16 as well, except
    tiny ones, which are rounded.
    """
    K = weight.shape[1]
    matrix = Matrix("int4", weight)
    assert matrix.scales is not None
    assert matrix.lows is not None
    n = K // GROUP
    scales = torch.stack([matrix.scales[:, :n], matrix.lows[:, :n]], dim=2).half()
    first, second = matrix.numbers()[:, :K].view(len(weight), n, 2, -1).unbind(2)
    return scales, first | second << 4
