"""What the tasks on records have in common: the records of each step, and scores of texts."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from gpt.config import GenerationConfig, UsageError
from gpt.data.batches import IGNORED
from gpt.data.completions import Completed, padded
from gpt.data.order import Order
from gpt.data.tokenizer import Tokenizer
from gpt.model.adapter import without_adapter
from gpt.model.gpt import GPT, Read
from gpt.training.loop import Trainer
from gpt.training.parallel import World
from gpt.training.source import Forward
from gpt.training.task import text_logprobs

StartModel = Callable[[], GPT]
"""Loads the model that the run started from."""


class StartLogits:
    """The logits of the model that the run started from, in the run's precision.

    Under an adapter, that model is in the trained one: it computes without its adapter. Else the
    start model is loaded at the first use.
    """

    def __init__(self, trainer: Trainer, load: StartModel) -> None:
        self._trainer, self._load = trainer, load
        self.loaded: GPT | None = None

    def __call__(
        self, tokens: Tensor, documents: Tensor | None = None, read: Read | None = None
    ) -> Tensor:
        """As in :class:`gpt.training.source.Forward`."""
        trainer = self._trainer
        if trainer.config.adapter.kind != "none":
            with without_adapter(trainer.model):
                return trainer.logits(tokens, documents, read)
        if self.loaded is None:
            self.loaded = self._load().to(trainer.device).requires_grad_(False).eval()
        with trainer.autocast:
            logits: Tensor = self.loaded(tokens, documents=documents, read=read)
        return logits


class Write(Protocol):
    """Writes a text after each prompt: its tokens, and its text."""

    def __call__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        config: GenerationConfig,
        dtype: torch.dtype,
    ) -> Sequence[tuple[list[int], str]]: ...


class RecordOrder:
    """Which records each step takes: all of them once in each epoch, in a new order."""

    def __init__(self, n: int, *, records: int, seed: int) -> None:
        self.order = Order(n, batch_size=records, seed=seed, kind="table")
        self.records = records

    def check(self, world: World) -> None:
        """``UsageError`` if the processes cannot share a step's records equally."""
        if self.records % world.size:
            raise UsageError(
                f"objective.records is {self.records}, which {world.size} processes cannot share "
                f"equally; {-(-self.records // world.size) * world.size} is the next that fits"
            )

    def step(self, step: int) -> NDArray[np.int64]:
        """The records of ``step``, ``[records]``."""
        return self.order.step(step)


@torch.no_grad()
def logprobs_of_rows(
    trainer: Trainer,
    rows: Sequence[Completed],
    forward: Forward,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> list[list[float]]:
    """The log-probability of each token of each row's completion, in nats, on this process. All
    processes must call this with as many rows.

    A row's numbers depend on the rows beside it only by rounding. The trainer's model is in
    evaluation mode meanwhile. The other arguments are those of :func:`text_logprobs`.
    """
    model = trainer.model
    training = model.training
    model.eval()
    size = trainer.config.training.micro_batch_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].completion))
    found: list[list[float]] = [[] for _ in rows]
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        batch = padded([rows[i] for i in chosen]).to(trainer.device)
        logprobs = text_logprobs(forward, batch, temperature=temperature, vocab_size=vocab_size)
        for i, own, target in zip(chosen, logprobs.tolist(), batch.targets.tolist(), strict=True):
            found[i] = [x for x, t in zip(own, target, strict=True) if t != IGNORED]
    if isinstance(model, FSDPModule):
        model.reshard()  # usually the backward pass does it
    model.train(training)
    return found


def summed_logprobs(trainer: Trainer, rows: Sequence[Completed], forward: Forward) -> Tensor:
    """The log-probability of each row's completion, ``[N]`` in float64, in nats. The processes
    share the rows, and all must call this.
    """
    world = trainer.world
    each = -(-len(rows) // world.size)
    places = [min(world.rank * each + i, len(rows) - 1) for i in range(each)]
    found = torch.zeros(len(rows), dtype=torch.float64)
    own = logprobs_of_rows(trainer, [rows[i] for i in places], forward)
    for number, logprobs in enumerate(own):
        if world.rank * each + number < len(rows):
            found[places[number]] = math.fsum(logprobs)
    return world.sum(found)
