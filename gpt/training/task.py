"""What a run learns besides next tokens: its batches, its loss, and its evaluation.

The loop is the same for all tasks. A task gives it a source of batches and an objective, evaluates
the model, and counts :class:`Figures` for the log.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gpt.data.batches import IGNORED, Batch
from gpt.model.gpt import GPT
from gpt.training.loss import losses_of_features
from gpt.training.parallel import World
from gpt.training.source import Forward, Source

if TYPE_CHECKING:
    from gpt.training.loop import Trainer


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    loss: float
    """The lower, the better the checkpoint."""
    figures: dict[str, Any] = field(default_factory=dict)
    sample: str = ""
    """A text by the model, with its prompt; or empty."""


class Figures:
    """Means of figures over the steps since the last record, over all processes. ``tokens`` is the
    number of tokens in a step.
    """

    def __init__(self) -> None:
        self._here: dict[str, list[Tensor]] = {}
        self._sums: dict[str, list[float]] = {}

    def add(self, **figures: Tensor) -> None:
        """Add one number or more for each figure, of this process and this step."""
        for name, numbers in figures.items():
            numbers = numbers.detach().double().reshape(-1)
            both = torch.stack([numbers.sum(), numbers.new_tensor(numbers.numel())])
            self._here.setdefault(name, []).append(both)

    def settle(self, world: World) -> None:
        """End a step: add its figures of all processes, which have the same names."""
        if self._here:
            sums = torch.stack([torch.stack(each).sum(0) for each in self._here.values()])
            for name, (total, n) in zip(self._here, world.sum(sums.cpu()).tolist(), strict=True):
                before = self._sums.get(name, [0.0, 0.0])
                self._sums[name] = [before[0] + total, before[1] + (1 if name == "tokens" else n)]
        self._here = {}

    def take(self) -> dict[str, float]:
        """The means, which begin anew."""
        means = {name: total / max(n, 1) for name, (total, n) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint stores, as JSON."""
        return dict(self._sums)  # a thread writes it while the run goes on

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Continue after :meth:`state`."""
        self._sums = {name: list(both) for name, both in state.items()}


class Task(Source, Protocol):
    """What a run learns, and the source of its batches."""

    figures: Figures

    def attach(self, trainer: "Trainer") -> None:
        """Receive the trainer whose model learns, before its first step."""

    def objective(self, forward: Forward, batch: Any) -> Tensor:
        """The loss of a batch of the source, summed over its targets."""

    def evaluate(self) -> Evaluation:
        """Evaluate the model on the held-out records. All processes call it."""

    def describe(self) -> list[str]:
        """Lines for the beginning of the run: the data, the steps, and perhaps more."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must store besides, as JSON; usually nothing."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after :meth:`state`."""


def text_logprobs(
    forward: Forward, batch: Batch, *, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """The log-probability of each target ``[B, T]`` in nats, in float32 (float64 for a model of
    float64); 0 where the target is ``IGNORED``. Only the other positions go through the head.

    The distribution is the softmax of the first ``vocab_size`` logits over the ``temperature``: the
    one from which a decoder draws.
    """
    counted = batch.targets != IGNORED

    def read(model: GPT, features: Tensor) -> Tensor:
        own = features[counted], batch.targets[counted]
        losses = losses_of_features(model, *own, temperature=temperature, vocab_size=vocab_size)
        logprobs = losses.new_zeros(counted.shape)
        logprobs[counted] = -losses
        return logprobs

    return forward(batch.tokens, documents=batch.documents, read=read)
