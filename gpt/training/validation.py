"""A model's loss on held-out text, on the same windows at every evaluation."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt.data.batches import IGNORED, Windows
from gpt.data.mixture import MixedWindows
from gpt.training.loss import loss_of_features
from gpt.training.parallel import World


@dataclass(frozen=True)
class Score:
    """The mean loss over the targets in the windows."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """The same loss per byte of text, which is comparable between tokenizers."""
    bytes_per_token: float
    """Of the text that was scored."""
    by_source: dict[str, float] = field(default_factory=dict)
    """The loss on each source of a mixture."""


@torch.no_grad()
def score(
    model: nn.Module,
    windows: Windows,
    chosen: NDArray[np.int64],
    *,
    byte_lengths: NDArray[np.int64],
    batch_size: int,
    device: torch.device,
    autocast: AbstractContextManager[object],
    world: World,
) -> Score:
    """The model's score on the ``chosen`` windows, in evaluation mode. Restores the model's mode.

    The processes take turns with the batches, and the losses are added in the order of the batches:
    the score is the same on any number of processes. ``byte_lengths`` ``[V]`` has the bytes of text
    in each token.
    """
    training = model.training
    model.eval()
    batches = np.split(chosen, range(batch_size, len(chosen), batch_size))
    losses: dict[int, Tensor] = {}
    figures = torch.zeros(3, len(batches), dtype=torch.float64)  # losses, tokens, bytes
    for turn in range(0, len(batches), world.size):
        number = turn + world.rank
        # A process without a batch computes the last one again: fsdp needs all processes.
        batch = windows.batch(batches[min(number, len(batches) - 1)])
        there = batch.to(device)
        read = partial(loss_of_features, targets=there.targets)
        with autocast:
            loss = model(there.tokens, documents=there.documents, read=read)
        if number < len(batches):
            losses[number] = loss
            learned = batch.targets[batch.targets != IGNORED]
            figures[1, number] = len(learned)
            figures[2, number] = int(byte_lengths[learned.numpy()].sum())
    model.train(training)
    for number, summed in losses.items():  # only here, to wait for a GPU once
        figures[0, number] = summed.item()
    total, n_tokens, n_bytes = world.sum(figures).sum(1).tolist()
    n_bytes = max(n_bytes, 1)
    return Score(total / n_tokens, total / (n_bytes * math.log(2)), n_bytes / n_tokens)


def score_all(model: nn.Module, windows: Windows, n: int, **options: Any) -> Score:
    """The :func:`score` on ``n`` of the windows (0: all of them). On a mixture, it is the mean over
    its sources by their weights, however much text of each is held out.
    """
    if not isinstance(windows, MixedWindows):
        return score(model, windows, windows.spread(n), **options)
    loss, bytes_per_token, by_source = 0.0, 0.0, {}
    for name, weight, part, chosen in windows.by_source(n):
        own = score(model, part, chosen, **options)
        by_source[name] = own.loss
        loss += weight * own.loss
        bytes_per_token += weight * own.bytes_per_token
    return Score(loss, loss / (bytes_per_token * math.log(2)), bytes_per_token, by_source)
