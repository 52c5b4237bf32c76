"""How well a model predicts held-out text, on windows that are the same at every evaluation."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpt.data.batches import Windows
from gpt.training.loss import summed_loss


@dataclass(frozen=True)
class Score:
    """The mean loss over the targets of the windows."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """The same loss per byte of text: comparable between tokenizers."""


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
) -> Score:
    """The model's score on the ``chosen`` windows, in evaluation mode; leaves the model's mode as
    it was.

    ``byte_lengths`` ``[V]`` says how many bytes of text each token stands for.
    """
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    n_tokens = n_bytes = 0
    for start in range(0, len(chosen), batch_size):
        batch = windows.batch(chosen[start : start + batch_size])
        with autocast:
            logits = model(batch.tokens.to(device))
        total += summed_loss(logits, batch.targets.to(device)).to(total)
        n_tokens += batch.targets.numel()
        n_bytes += int(byte_lengths[batch.targets.numpy()].sum())
    model.train(training)
    return Score(total.item() / n_tokens, total.item() / (max(n_bytes, 1) * math.log(2)))
