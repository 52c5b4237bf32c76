"""Where a run's batches come from, and what is learned from them."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from gpt.data.batches import Batch, Order, Windows
from gpt.training.loss import summed_loss
from gpt.training.parallel import World


class Source(Protocol):
    """What a run learns from, step by step."""

    sequences: int
    """Of one step, over all processes."""

    def batch(self, step: int, world: World) -> Batch:
        """What ``step`` (from 0) learns from, the part of this process."""

    def prepare(self, step: int, world: World) -> None:
        """Read the batch of ``step`` ahead, while the step before is being computed. A source whose
        batches depend on the weights does nothing here.
        """

    def origin(self, step: int) -> list[int]:
        """What the batch of ``step`` is made of on all processes, for a report: window numbers."""


Forward = Callable[[Tensor], Tensor]
"""Tokens ``[B, T]`` to logits ``[B, T, V]``, in the run's precision."""
Objective = Callable[[Forward, Batch], Tensor]
"""The loss of a batch, summed over its targets."""


class ShuffledWindows:
    """The windows of a text, in a new order each epoch: a :class:`Source`."""

    def __init__(self, windows: Windows, *, sequences: int, seed: int) -> None:
        self.windows, self.sequences = windows, sequences
        self.order = Order(len(windows), batch_size=sequences, seed=seed)
        self._ahead: tuple[int, Batch] | None = None

    def batch(self, step: int, world: World) -> Batch:
        """As :class:`Source`."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        return self.windows.batch(world.split(self.order.step(step)))

    def prepare(self, step: int, world: World) -> None:
        """As :class:`Source`."""
        self._ahead = step, self.batch(step, world)

    def origin(self, step: int) -> list[int]:
        """As :class:`Source`."""
        windows: list[int] = self.order.step(step).tolist()
        return windows


def next_token(forward: Forward, batch: Batch) -> Tensor:
    """Cross-entropy of each next token: the :data:`Objective` of pretraining."""
    return summed_loss(forward(batch.tokens), batch.targets)
