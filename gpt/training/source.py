"""A run's source of batches, and its objective: the loss of a batch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gpt.config import WindowOrder
from gpt.data.batches import Batch, Windows
from gpt.data.mixture import MixedOrder, MixedWindows
from gpt.data.order import Order
from gpt.model.gpt import Read
from gpt.training.loss import loss_of_features
from gpt.training.parallel import World


class Learnable(Protocol):
    """A batch: what an objective learns from."""

    def n_targets(self) -> int:
        """What the loss is averaged over: tokens, texts or pairs of texts."""

    def split(self, size: int) -> Iterator[Self]:
        """Micro batches of about ``size`` sequences."""

    def to(self, device: torch.device) -> Self:
        """The batch on ``device``."""


class Source(Protocol):
    """Gives a run its batches, step by step."""

    sequences: int
    """Sequences in one step, over all processes."""

    def batch(self, step: int, world: World) -> Learnable:
        """The part of this process in the batch for ``step`` (from 0)."""

    def prepare(self, step: int, world: World) -> None:
        """Read the batch of ``step`` in advance, during the step before. A no-op if the batches
        depend on the weights.
        """

    def origin(self, step: int) -> list[int]:
        """The window numbers in the batch of ``step`` on all processes, for a report."""

    def describe(self) -> list[str]:
        """What the user should know of the batches, in a few lines."""

    def progress(self, step: int) -> dict[str, Any]:
        """How much of the data the steps before ``step`` took, as figures for the log: ``epoch``,
        and more if the source has more to tell.
        """


class Forward(Protocol):
    """The model in the run's precision."""

    def __call__(
        self, tokens: Tensor, documents: Tensor | None = None, read: Read | None = None
    ) -> Tensor:
        """Tokens ``[B, T]`` to logits ``[B, T, V]``, or to what ``read`` makes of the features, as
        :meth:`gpt.model.gpt.GPT.forward`.
        """


Objective = Callable[[Forward, Any], Tensor]
"""The loss of a batch of the run's source, summed over its targets."""


class ShuffledWindows:
    """A :class:`Source` of a text's windows, in a new order each epoch."""

    def __init__(
        self, windows: Windows, *, sequences: int, seed: int, kind: WindowOrder = "auto"
    ) -> None:
        self.windows, self.sequences = windows, sequences
        self.order: Order | MixedOrder
        if isinstance(windows, MixedWindows):
            self.order = MixedOrder(windows, batch_size=sequences, seed=seed, kind=kind)
        else:
            self.order = Order(len(windows), batch_size=sequences, seed=seed, kind=kind)
        self._ahead: tuple[int, Batch] | None = None

    def batch(self, step: int, world: World) -> Batch:
        """As in :class:`Source`."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        return self.windows.batch(world.split(self.order.step(step)))

    def prepare(self, step: int, world: World) -> None:
        """As in :class:`Source`."""
        self._ahead = step, self.batch(step, world)

    def origin(self, step: int) -> list[int]:
        """As in :class:`Source`."""
        windows: list[int] = self.order.step(step).tolist()
        return windows

    def describe(self) -> list[str]:
        """As in :class:`Source`."""
        return self.windows.describe()

    def progress(self, step: int) -> dict[str, Any]:
        """``epoch``, and ``seen``: the share of the windows that was taken at least once. Of a
        mixture, ``sources`` has both for each one.
        """
        total = step * self.sequences / len(self.windows)
        if not isinstance(self.order, MixedOrder):
            return {"epoch": total, "seen": min(1.0, total)}
        epochs = self.order.epochs(step)
        sources = {name: {"epoch": n, "seen": min(1.0, n)} for name, n in epochs.items()}
        return {"epoch": total, "sources": sources}


def next_token(forward: Forward, batch: Batch) -> Tensor:
    """Cross-entropy of each next token: the :data:`Objective` of pretraining."""
    read = partial(loss_of_features, targets=batch.targets)
    return forward(batch.tokens, documents=batch.documents, read=read)
