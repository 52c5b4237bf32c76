"""The loss, which is not part of the model: cross-entropy of the next token, in nats.

With a large vocabulary, the logits are the largest tensor of a step, and a float32 copy of bfloat16
logits takes twice their memory. So the loss and its gradient are computed for a few rows at a time,
and the gradient overwrites the logits. Of many positions, the head is computed in such chunks too,
with the gradients of its matrix and of the features: then the logits of a whole batch never exist,
and the time of this part of the backward pass counts as forward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.data.batches import IGNORED
from gpt.model.gpt import GPT

ROWS = 256
"""Positions that go through a frozen head at a time."""
LOGITS = {"cpu": 2**25, "gpu": 2**27}
"""The most logits in a chunk of a head that learns. Each chunk adds a gradient of the head's matrix
to the sum so far, so small chunks take more time."""
MIN_POSITIONS_PER_FEATURE = 4
"""A head that learns is computed in chunks only above so many positions for each feature. Below,
two gradients of its matrix take more memory than the logits."""
MULTIPLE = 32
"""Where some targets do not count, positions go through the head in a multiple of so many: oneDNN
compiles a product for each number of rows."""
LossesOf = Callable[[Tensor, slice], Tensor]
"""From features ``[n, C]``, and the slice of the positions that they are, to losses ``[n]``."""
CHUNK = {"cpu": 2**22, "gpu": 2**26}
"""Logits to convert to float32 at a time: 16 MB on a CPU, enough to keep a GPU busy."""


class _Losses(torch.autograd.Function):
    """Cross-entropy ``[N]`` of ``logits`` ``[N, V]``, whose backward pass overwrites them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return torch.cat(
            [
                F.cross_entropy(_wide(rows), some, reduction="none", ignore_index=IGNORED)
                for rows, some in chunks(logits, targets)
            ]
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        for rows, some, slopes in chunks(logits, targets, gradient):
            counted = some != IGNORED
            index = torch.where(counted, some, 0)[:, None]
            # d loss / d logits = softmax(logits) - one_hot(targets)
            slope = rows.softmax(dim=-1, dtype=slopes.dtype)
            slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
            rows.copy_(slope.mul_((counted * slopes)[:, None]))
        return logits, None


def _wide(logits: Tensor) -> Tensor:
    """In float32, or float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
    return _losses(logits.flatten(0, 1), targets.flatten()).sum()


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    losses: Tensor = _Losses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _LossesOfFrozenHead(torch.autograd.Function):
    """The losses ``[N]`` of features ``[N, C]``, whose gradients are computed with them. Each loss
    depends on its own row of features alone, so the gradient that comes back only scales the rows.
    """

    @staticmethod
    def forward(ctx: Any, losses_of: LossesOf, features: Tensor) -> Tensor:
        learned = ctx.needs_input_grad[1]
        found, [ctx.slope] = _in_chunks(losses_of, ROWS, features, learned, ())
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        slope, ctx.slope = ctx.slope, None  # a second backward pass would scale it again
        return None, slope.mul_(gradient[:, None])


class _LossOfLearnedHead(torch.autograd.Function):
    """The summed losses of features ``[N, C]`` by a head with ``weights`` that learn. The gradients
    are computed with the sum, so the gradient that comes back only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, losses_of: LossesOf, rows: int, features: Tensor, *weights: Tensor
    ) -> Tensor:
        learned = ctx.needs_input_grad[2]
        found, ctx.slopes = _in_chunks(losses_of, rows, features, learned, weights)
        return found.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, ctx.slopes = ctx.slopes, None  # a second backward pass would scale them again
        scaled = [None if slope is None else slope.mul_(gradient) for slope in slopes]
        return None, None, *scaled


def _in_chunks(
    losses_of: LossesOf, rows: int, features: Tensor, learned: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses ``[N]`` of so many rows of ``features`` at a time, and the gradients of their sum:
    for the features, if ``learned`` (else ``None``), and for the head's ``weights``.
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    found = torch.empty(len(features), dtype=wide, device=features.device)
    slope = torch.empty_like(features) if learned else None
    slopes = [torch.zeros_like(weight, dtype=wide) for weight in weights]
    for start in range(0, len(features), rows):
        part = slice(start, start + rows)
        some = features[part].detach().requires_grad_(learned)
        with torch.set_grad_enabled(learned or bool(weights)):
            losses = losses_of(some, part)
            total = losses.sum()
        found[part] = losses.detach()
        wanted = [some, *weights] if learned else [*weights]
        own = list(torch.autograd.grad(total, wanted)) if wanted else []
        if slope is not None:
            slope[part] = own.pop(0)
        for known, gradient in zip(slopes, own, strict=True):
            known += gradient
    return found, [slope, *slopes]


def counted_positions(targets: Tensor) -> Tensor | None:
    """Where ``targets`` ``[B, T]`` count in the loss; ``None`` if all do."""
    counted = targets != IGNORED
    return None if counted.all() else counted


def _counted_only(counted: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The ``counted`` positions as one row, padded to a multiple of ``MULTIPLE`` with position 0,
    without its target.
    """
    at = counted.flatten().nonzero()[:, 0]
    n = len(at)
    at = F.pad(at, (0, min(-n % MULTIPLE, counted.numel() - n)))
    chosen = targets.flatten()[at]
    chosen[n:] = IGNORED
    return features.flatten(0, 1)[at][None], chosen[None]


def loss_of_features(model: GPT, features: Tensor, *, targets: Tensor) -> Tensor:
    """The :func:`summed_loss` of the logits that the model makes of its features ``[B, T, C]``.

    Positions without a target do not go through the head. On a GPU only a frozen head leaves them
    out, because to find them is to wait for the device.
    """
    if torch.compiler.is_compiling():  # what follows branches on the targets, or calls autograd
        return summed_loss(model.logits(features), targets)
    is_frozen = has_frozen_head(model)
    counted = counted_positions(targets) if is_frozen or not targets.is_cuda else None
    if counted is not None:
        features, targets = _counted_only(counted, features, targets)
    flat = targets.flatten()
    if is_frozen:
        return losses_of_features(model, features.flatten(0, 1), flat).sum()
    return summed_by_head(
        model, features.flatten(0, 1), lambda some, part: _losses(model.logits(some), flat[part])
    )


def summed_by_head(model: GPT, features: Tensor, losses_of: LossesOf) -> Tensor:
    """The sum of ``losses_of`` over features ``[N, C]``. If there are many, it is called for a
    chunk at a time, and the gradients are computed in the forward pass.
    """
    rows = _rows_at_a_time(model, features)
    if rows >= len(features):
        return losses_of(features, slice(None)).sum()
    learns = torch.is_grad_enabled()  # inside a Function, gradients are always off
    weights = [p for p in model.head.parameters() if learns and p.requires_grad]
    total: Tensor = _LossOfLearnedHead.apply(losses_of, rows, features, *weights)  # type: ignore[no-untyped-call]
    return total


def _rows_at_a_time(model: GPT, features: Tensor) -> int:
    """The rows of a chunk of ``features`` ``[N, C]``, for a head that learns. In float16 it is all
    of them, because the scale of the loss must reach the gradient of the logits.
    """
    kind, (V, C) = features.device.type, model.head.weight.shape
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    n = len(features)
    few = n <= MIN_POSITIONS_PER_FEATURE * C
    whole = model.pointer is not None or dtype == torch.float16 or torch.compiler.is_compiling()
    if few or whole:
        return n
    rows = LOGITS["cpu" if kind == "cpu" else "gpu"] // V
    return max(MULTIPLE, rows - rows % MULTIPLE)


def has_frozen_head(model: GPT) -> bool:
    """Whether the logits depend on the features alone, by weights without gradients."""
    return model.pointer is None and not model.head.weight.requires_grad


def losses_of_features(
    model: GPT,
    features: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The cross-entropy ``[N]`` of ``targets`` ``[N]`` for features ``[N, C]``, in float32 (float64
    for a model of float64), by the softmax of the first ``vocab_size`` logits over the
    ``temperature``.
    """

    def head(some: Tensor) -> Tensor:
        logits = model.logits(some)
        if vocab_size is not None and vocab_size < logits.shape[1]:
            logits = logits[:, :vocab_size]
        return logits if temperature == 1 else _wide(logits) / temperature

    if not has_frozen_head(model):
        return _losses(head(features), targets)

    def losses_of(some: Tensor, part: slice) -> Tensor:
        return _losses(head(some), targets[part])

    losses: Tensor = _LossesOfFrozenHead.apply(losses_of, features)  # type: ignore[no-untyped-call]
    return losses
