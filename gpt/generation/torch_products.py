"""Products with int8 and int4 matrices by torch's CPU operators, for machines without a C++
compiler. The operators take bfloat16 activations and convert weights to float32 in registers. They
are fast with and without bfloat16 instructions.

The operators need another order of the weights, so the weights are copied once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.generation.quantisation import Matrix
from gpt.kernels import GROUP

ROWS = 64
"""The int4 operator needs a multiple of this many rows of the matrix."""


class TorchProduct:
    """A product with one matrix ``[N, K]`` of int8 or int4."""

    def __init__(self, matrix: Matrix) -> None:
        assert matrix.scales is not None
        numbers = matrix.numbers()
        self.n_rows, self.padded = len(numbers), numbers.shape[1]
        self.is_int8 = matrix.lows is None
        if matrix.lows is None:
            self.weights = (numbers.to(torch.int16) - 128).to(torch.int8)
            self.scales = matrix.scales.bfloat16()
        else:
            extra = -self.n_rows % ROWS
            # (q - 8) * scale + zero
            zeros = matrix.lows.float() + 8 * matrix.scales.float()
            pairs = torch.stack([matrix.scales.float(), zeros], dim=2)  # N, K / 32, 2
            pairs = F.pad(pairs, (0, 0, 0, 0, 0, extra)).transpose(0, 1).contiguous()
            self.scales = pairs.bfloat16()
            whole = F.pad(numbers, (0, 0, 0, extra)).to(torch.int32)
            self.weights = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[..., K]`` to ``[..., N]`` of float32; input and output are rounded to bfloat16.

        With float32 inputs, the operators are a scalar loop, which is 10 times slower.
        """
        rows = F.pad(x, (0, self.padded - x.shape[-1])).flatten(0, -2).bfloat16()
        if self.is_int8:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weights, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weights, GROUP, self.scales)
        out = y[:, : self.n_rows].float()
        return out.view(*x.shape[:-1], self.n_rows)
