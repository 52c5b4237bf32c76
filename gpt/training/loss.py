"""The loss, outside of the model: cross-entropy of the next token, in nats."""

import torch.nn.functional as F
from torch import Tensor


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over all tokens, in float32, of ``logits`` ``[B, T, V]`` against ``targets`` ``[B,
    T]``
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
