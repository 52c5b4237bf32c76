"""Scheduled sampling against exposure bias, in two passes (Mihaylova and Martins, 2019,
arXiv:1906.07651; Bengio et al., 2015, arXiv:1506.03099).

In training, a model reads the text's tokens, and later its own. Here it also reads its own in
training. The first pass reads the text, and predicts every token. Then some tokens are replaced by
draws from these predictions, and the second pass learns the text's next tokens from that. The share
of replaced tokens follows a schedule.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import TrainingConfig
from gpt.data.batches import IGNORED, Batch
from gpt.training.parallel import World
from gpt.training.source import Forward, Source, next_token

SIGMOID_STEEPNESS = 10.0
"""The logistic function runs from -5 to 5, and is stretched so that it rises from 0 to 1."""


def _sigmoid(x: float) -> float:
    def curve(x: float) -> float:
        return 1 / (1 + math.exp(-SIGMOID_STEEPNESS * (x - 0.5)))

    return (curve(x) - curve(0)) / (curve(1) - curve(0))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "sigmoid": _sigmoid,
    "constant": lambda x: 1.0,
}
"""From the fraction of the rise that is done, 0 to 1, to the fraction of the highest share."""


def share_of(step: int, config: TrainingConfig) -> float:
    """The share of input tokens that are replaced in ``step`` (from 0)."""
    start = config.scheduled_sampling_start * config.max_steps
    if step < start:
        return 0.0
    x = (step - start) / max(1.0, config.max_steps - 1 - start)
    return config.scheduled_sampling * SCHEDULES[config.scheduled_sampling_schedule](x)


@dataclass(frozen=True)
class Mixed:
    """A batch, and a number in [0, 1) for each of its tokens. A token whose number is below
    ``share`` is replaced, and the number divided by the share draws the new one.
    """

    batch: Batch
    numbers: Tensor
    share: float

    def n_targets(self) -> int:
        """The number of targets that count in the loss."""
        return self.batch.n_targets()

    def split(self, size: int) -> "Iterator[Mixed]":
        """Batches of ``size`` sequences."""
        parts = zip(self.batch.split(size), self.numbers.split(size), strict=True)
        return (Mixed(batch, numbers, self.share) for batch, numbers in parts)

    def to(self, device: torch.device) -> "Mixed":
        """The batch on ``device``."""
        return Mixed(self.batch.to(device), self.numbers.to(device), self.share)


class ScheduledSampling:
    """A source whose batches are those of ``source``, with the numbers for this step's draws. They
    depend on (seed, step) and on the sequence alone, not on how many processes share a step.
    """

    def __init__(self, source: Source, config: TrainingConfig) -> None:
        self.source, self.config, self.sequences = source, config, source.sequences

    def batch(self, step: int, world: World) -> Batch | Mixed:
        """As in :class:`Source`. Without a share, the batch of the source itself."""
        batch, share = self.source.batch(step, world), share_of(step, self.config)
        assert isinstance(batch, Batch), "the batches are windows of a text"
        if not share:
            return batch
        draws = np.random.Generator(np.random.Philox((self.config.seed, step)))
        rows = np.arange(self.sequences)
        numbers = draws.random((self.sequences, batch.tokens.shape[1]), np.float32)
        return Mixed(batch, torch.from_numpy(numbers[world.split(rows)]), share)

    def prepare(self, step: int, world: World) -> None:
        """As in :class:`Source`."""
        self.source.prepare(step, world)

    def origin(self, step: int) -> list[int]:
        """As in :class:`Source`."""
        return self.source.origin(step)

    def describe(self) -> list[str]:
        """As in :class:`Source`."""
        return self.source.describe()

    def progress(self, step: int) -> dict[str, Any]:
        """As in :class:`Source`."""
        return self.source.progress(step)


def scheduled(forward: Forward, batch: Batch | Mixed) -> Tensor:
    """Cross-entropy of the text's next tokens, from a mixture of its tokens and own predictions."""
    if isinstance(batch, Batch):
        return next_token(forward, batch)
    with torch.no_grad():
        logits = forward(batch.batch.tokens, batch.batch.documents)
    own = batch.numbers.where(_written(batch.batch), 1.0)
    tokens = mixed(batch.batch.tokens, logits, own, batch.share)
    return next_token(forward, dataclasses.replace(batch.batch, tokens=tokens))


def _written(batch: Batch) -> Tensor:
    """Where a token stands that the model learns to write, ``[B, T]``: not in a prompt, and not at
    the beginning of a document, which nothing before it predicts.
    """
    written = torch.zeros_like(batch.targets, dtype=torch.bool)
    written[:, 1:] = batch.targets[:, :-1] != IGNORED
    if batch.documents is not None:
        written[:, 1:] &= batch.documents[:, 1:] == batch.documents[:, :-1]
    return written


def mixed(tokens: Tensor, logits: Tensor, numbers: Tensor, share: float) -> Tensor:
    """``tokens`` ``[B, T]``, some of which are replaced by draws from ``logits`` ``[B, T, V]`` at
    the position before. The first token of a row stays.
    """
    replaced = (numbers < share)[:, 1:]
    wanted = numbers[:, 1:][replaced] / share
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits[:, :-1][replaced].to(exact).softmax(-1).cumsum(-1)
    draws = (cumulative <= wanted[:, None] * cumulative[:, -1:]).sum(-1)
    new = tokens.clone()
    new[:, 1:][replaced] = draws.clamp_max(logits.shape[-1] - 1)
    return new
