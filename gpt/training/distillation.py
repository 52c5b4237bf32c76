"""Distillation (Hinton et al., 2015, arXiv:1503.02531): a run learns what other models predict.

The loss of a token is ``w T^2 KL(p || q) + (1 - w) CE``. ``p`` is the mean of the teachers'
distributions and ``q`` the student's, both with logits divided by the temperature ``T``; ``CE`` is
the cross-entropy of the text's own next token. An ensemble of k seeds becomes one model that way.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import ObjectiveConfig, TrainConfig, UsageError, foreign
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import IGNORED, Batch
from gpt.data.tokenizer import Tokenizer
from gpt.model.gpt import GPT
from gpt.training.loss import chunks, summed_by_head
from gpt.training.source import Forward


class Distillation:
    """The objective of a run with teachers."""

    def __init__(
        self, teachers: Sequence[GPT], config: ObjectiveConfig, *, device: torch.device
    ) -> None:
        self.teachers = [teacher.to(device).eval().requires_grad_(False) for teacher in teachers]
        self.weight, self.temperature = config.distill_weight, config.distill_temperature

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        """The loss of a batch, summed over its targets."""
        read = partial(self._loss, batch=batch)
        return forward(batch.tokens, documents=batch.documents, read=read)

    @torch.no_grad()
    def features(self, batch: Batch) -> list[Tensor]:
        """Each teacher's features of the batch, ``[B T, C]``."""
        return [
            teacher.features(batch.tokens, documents=batch.documents).flatten(0, 1)
            for teacher in self.teachers
        ]

    @torch.no_grad()
    def probabilities(self, taught: list[Tensor]) -> Tensor:
        """The teachers' mean distribution over the next token, float32 ``[n, V]``, from the
        features ``[n, C]`` of each teacher.
        """
        total: Tensor | None = None
        for teacher, features in zip(self.teachers, taught, strict=True):
            own = (teacher.logits(features).float() / self.temperature).softmax(dim=-1)
            total = own if total is None else total.add_(own)
        assert total is not None, "a run with this objective has teachers"
        return total if len(self.teachers) == 1 else total.div_(len(self.teachers))

    def _loss(self, model: GPT, features: Tensor, *, batch: Batch) -> Tensor:
        """The summed loss for the student's ``features`` ``[B, T, C]``. For many positions, the
        teachers' and the student's logits are computed in chunks. A run reads features under its
        autocast, so the teachers compute in its precision too.
        """
        targets, taught = batch.targets.flatten(), self.features(batch)

        def losses_of(some: Tensor, part: slice) -> Tensor:
            p = self.probabilities([each[part] for each in taught])
            own = model.logits(some), targets[part], p, self.weight, self.temperature
            losses: Tensor = _Distilled.apply(*own)  # type: ignore[no-untyped-call]
            return losses

        return summed_by_head(model, features.flatten(0, 1), losses_of)


class _Distilled(torch.autograd.Function):
    """The losses ``[N]`` of ``logits`` ``[N, V]``, whose backward pass overwrites them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, taught: Tensor, weight: float, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(logits, targets, taught)
        ctx.weight, ctx.temperature = weight, temperature
        found = []
        for rows, some, p in chunks(logits, targets, taught):
            log_q = (rows.float() / temperature).log_softmax(dim=-1)
            divergence = (torch.xlogy(p, p) - p * log_q).sum(dim=-1)
            losses = weight * temperature**2 * divergence.masked_fill_(some == IGNORED, 0)
            if weight < 1:
                hard = F.cross_entropy(rows.float(), some, reduction="none", ignore_index=IGNORED)
                losses += (1 - weight) * hard
            found.append(losses)
        return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, taught = ctx.saved_tensors
        weight, temperature = ctx.weight, ctx.temperature
        for rows, some, p, slopes in chunks(logits, targets, taught, gradient):
            counted = some != IGNORED
            slope = (rows.float() / temperature).softmax(dim=-1).sub_(p).mul_(weight * temperature)
            if weight < 1:
                hard = rows.softmax(dim=-1, dtype=torch.float32)
                index = torch.where(counted, some, 0)[:, None]
                hard.scatter_add_(1, index, torch.full_like(index, -1, dtype=hard.dtype))
                slope.add_(hard, alpha=1 - weight)
            rows.copy_(slope.mul_((counted * slopes)[:, None]))
        return logits, None, None, None, None


def load_teachers(
    config: TrainConfig, tokenizer: Tokenizer, load: Callable[[str], tuple[GPT, Tokenizer]]
) -> list[GPT]:
    """The models of ``objective.distill``. ``UsageError`` if one has another tokenizer, another
    vocabulary, or a shorter context than the run.
    """
    wanted, found = config.model, []
    for name in config.objective.teachers:
        try:
            model, own = load(name)
        except UsageError as error:
            raise UsageError(f"objective.distill: {error}") from None
        if tokenizers.fingerprint(own) != tokenizers.fingerprint(tokenizer):
            raise UsageError(
                f"objective.distill has {foreign(name)}, whose tokenizer is not that of the run"
            )
        for field, most in (
            ("vocab_size", model.config.vocab_size),
            ("context_length", model.config.most_positions() or wanted.context_length),
        ):
            value = getattr(wanted, field)
            if value > most or (field == "vocab_size" and value != most):
                raise UsageError(
                    f"model.{field} is {value}, and {foreign(name)}, which objective.distill has, "
                    f"has {most}"
                )
        found.append(model)
    return found
