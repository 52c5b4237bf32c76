"""The loss, outside of the model: cross-entropy of the next token, in nats."""

import torch.nn.functional as F
from torch import Tensor

from gpt.data.batches import IGNORED


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over all targets but the ``IGNORED`` ones, in float32, of ``logits`` ``[B, T, V]``
    against ``targets`` ``[B, T]``.
    """
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, targets.flatten(), reduction="sum", ignore_index=IGNORED)
