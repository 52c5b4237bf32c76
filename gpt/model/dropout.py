"""Dropout (arXiv:1207.0580) that is fast on a CPU.

``F.dropout`` on a CPU draws one Bernoulli variable at a time, which took a third of a training
step. Here one draw of 64 random bits decides for four elements. On other devices, ``F.dropout`` is
used.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import training_kernels


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each element of ``x`` to zero with probability ``p``, and scale the others by
    ``1 / (1 - p)``.

    On a CPU ``p`` is rounded to a multiple of 2**-16, and the scale uses the rounded ``p``.
    """
    if p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    n = x.numel()
    # from -2**63 without an end is the full range; the default range leaves the sign bit 0
    words = torch.empty(math.ceil(n / 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[:n].view(x.shape) >= dropped - 2**15
    return (x * keep.to(x.dtype)).mul_(2**16 / (2**16 - dropped))


class Dropout(nn.Module):
    """:func:`dropout` while training, nothing in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape; the result has the same shape."""
        return dropout(x, self.p) if self.training else x

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x + dropout(branch)``, for two tensors of the same shape."""
        drops = self.training and self.p > 0
        if drops and x.dtype in (torch.float32, branch.dtype) and training_kernels.takes(x, branch):
            return training_kernels.add_dropped(x, branch, self.p)
        out: Tensor = x + self(branch)
        return out
