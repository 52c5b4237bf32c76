"""The loss, which is not part of the model: cross-entropy of the next token, in nats.

With a large vocabulary, the logits are the largest tensor of a step, and a float32 copy of bfloat16
logits takes twice their memory. So the loss and its gradient are computed for a few rows at a time,
and the gradient overwrites the logits. Under an adapter the head is frozen. Then its logits are
computed for a few rows at a time too, and their gradient for the features at once: the logits of a
whole batch never exist.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.data.batches import IGNORED
from gpt.model.gpt import GPT

ROWS = 256
"""Positions that go through a frozen head at a time."""
CHUNK = {"cpu": 2**22, "gpu": 2**26}
"""Logits to convert to float32 at a time: 16 MB on a CPU, enough to keep a GPU busy."""


class _SummedLoss(torch.autograd.Function):
    """Cross-entropy of ``logits`` ``[N, V]`` whose backward pass overwrites them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        total = torch.zeros((), device=logits.device)
        for rows, some in chunks(logits, targets):
            total += F.cross_entropy(rows.float(), some, reduction="sum", ignore_index=IGNORED)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        for rows, some in chunks(logits, targets):
            counted = some != IGNORED
            index = torch.where(counted, some, 0)[:, None]
            # d loss / d logits = softmax(logits) - one_hot(targets)
            slope = rows.softmax(dim=-1, dtype=torch.float32)
            slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
            rows.copy_(slope.mul_((counted * gradient)[:, None]))
        return logits, None


def chunks(logits: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """A few rows of each tensor at a time."""
    kind = "cpu" if logits.device.type == "cpu" else "gpu"
    rows = max(1, CHUNK[kind] // logits.shape[-1])
    return list(zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of ``logits`` ``[B, T, V]`` and ``targets`` ``[B, T]``, in float32, summed
    over all targets except ``IGNORED`` ones.

    The backward pass overwrites ``logits`` with their gradient. If another operation needs them for
    its own backward pass, autograd raises ``RuntimeError``.
    """
    loss: Tensor = _SummedLoss.apply(logits.flatten(0, 1), targets.flatten())  # type: ignore[no-untyped-call]
    return loss


class _LossOfFrozenHead(torch.autograd.Function):
    """The summed loss of features ``[N, C]``, whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, targets: Tensor, model: GPT) -> Tensor:
        total = torch.zeros((), device=features.device)
        slope = torch.empty_like(features) if features.requires_grad else None
        for start in range(0, len(features), ROWS):
            rows = slice(start, start + ROWS)
            with torch.set_grad_enabled(slope is not None):
                some = features[rows].detach().requires_grad_(slope is not None)
                loss = summed_loss(model.logits(some)[None], targets[rows][None])
            total += loss.detach()
            if slope is not None:
                [slope[rows]] = torch.autograd.grad(loss, some)
        ctx.slope = slope
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.slope.mul_(gradient), None, None


def counted_positions(targets: Tensor) -> Tensor | None:
    """Where ``targets`` ``[B, T]`` count in the loss; ``None`` if all do."""
    counted = targets != IGNORED
    return None if counted.all() else counted


def loss_of_features(model: GPT, features: Tensor, *, targets: Tensor) -> Tensor:
    """The :func:`summed_loss` of the logits that the model makes of its features ``[B, T, C]``.

    Positions without a target do not go through the head, where the processor knows them: to ask
    a GPU for them would wait for it.
    """
    is_frozen = model.pointer is None and not model.head.weight.requires_grad
    counted = counted_positions(targets) if is_frozen or not targets.is_cuda else None
    if counted is not None:
        features, targets = features[counted][None], targets[counted][None]
    if not is_frozen:
        return summed_loss(model.logits(features), targets)
    flat = features.flatten(0, 1), targets.flatten()
    loss: Tensor = _LossOfFrozenHead.apply(*flat, model)  # type: ignore[no-untyped-call]
    return loss
