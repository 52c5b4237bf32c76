"""The loss, outside of the model: cross-entropy of the next token, in nats.

Half-precision logits of a large vocabulary are the largest tensor of a step, and a copy of all of
them in float32 is twice as large again. So the loss and its gradient are computed for some rows at
a time, and the gradient takes the place of the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.data.batches import IGNORED

CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Logits that are float32 at a time: few enough for a CPU's cache, enough to fill a GPU."""


class _SummedLoss(torch.autograd.Function):
    """Cross-entropy of ``logits`` ``[N, V]`` whose backward pass overwrites them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        total = torch.zeros((), device=logits.device)
        for rows, some in _chunks(logits, targets):
            total += F.cross_entropy(rows.float(), some, reduction="sum", ignore_index=IGNORED)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        for rows, some in _chunks(logits, targets):
            counted = some != IGNORED
            index = torch.where(counted, some, 0)[:, None]
            # d loss / d logits = softmax(logits) - one_hot(targets)
            slope = rows.softmax(dim=-1, dtype=torch.float32)
            slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
            rows.copy_(slope.mul_((counted * gradient)[:, None]))
        return logits, None


def _chunks(logits: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK.get(logits.device.type, 2**26) // logits.shape[-1])
    return list(zip(logits.split(rows), targets.split(rows), strict=True))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over all targets but the ``IGNORED`` ones, in float32, of ``logits`` ``[B, T, V]``
    against ``targets`` ``[B, T]``.

    The backward pass overwrites ``logits`` with their gradient; where another operation needs them
    for its own backward pass, autograd raises ``RuntimeError``.
    """
    loss: Tensor = _SummedLoss.apply(logits.flatten(0, 1), targets.flatten())  # type: ignore[no-untyped-call]
    return loss
