"""The loss of direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290).

It is that of a classifier which tells the chosen and the rejected text apart by how much more
likely the model makes each than the start model ``q`` does::

    margin = beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))
    loss   = -log sigmoid(margin)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.data.batches import IGNORED, Batch


def dpo_loss(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss and the rewards of pairs: ``[P]``, and ``[P, 2]``. ``policy`` and ``reference``
    ``[P, 2]`` are the log-probabilities of the chosen and the rejected texts, in nats.

    With ``label_smoothing``, a preference is wrong with that probability (Mitchell, "A note on DPO
    with noisy preferences", 2023).
    """
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong, rewards


@dataclass(frozen=True)
class Pairs:
    """P pairs: row 2i of ``texts`` is a chosen text, and row 2i + 1 the rejected one. ``reference``
    ``[P, 2]`` are the start model's log-probabilities.
    """

    texts: Batch
    reference: Tensor

    def n_targets(self) -> int:
        """The number of pairs."""
        return len(self.reference)

    def n_tokens(self) -> Tensor:
        """The number of tokens in the texts, without prompts and padding."""
        return (self.texts.targets != IGNORED).sum()

    def split(self, size: int) -> "Iterator[Pairs]":
        """Pairs of ``size`` sequences together, and at least one pair."""
        pairs = max(1, size // 2)
        return map(Pairs, self.texts.split(2 * pairs), self.reference.split(pairs))

    def to(self, device: torch.device) -> "Pairs":
        """The pairs on ``device``."""
        return Pairs(self.texts.to(device), self.reference.to(device))
