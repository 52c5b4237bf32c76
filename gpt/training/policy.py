"""Policy gradients: the loss of texts that the model wrote, and what a reward is compared with.

REINFORCE (Williams, 1992) raises the log-probability of each text in proportion to its advantage,
its reward minus a baseline. The expected gradient is that of the mean reward for every baseline
that does not depend on the text. That of the prompt's other texts is such a baseline (RLOO: Kool et
al., 2019; Ahmadian et al., 2024, arXiv:2402.14740).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt.config import Baseline, UsageError

SMALLEST_DEVIATION = 1e-4
"""Is added to a group's standard deviation: equal rewards have no advantage."""


def _leave_one_out(rewards: Tensor) -> Tensor:
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (k / (k - 1))


def _group(rewards: Tensor) -> Tensor:
    deviation = rewards.std(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)) / (deviation + SMALLEST_DEVIATION)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "leave_one_out": _leave_one_out,
    "group": _group,
    "none": lambda rewards: rewards,
}
"""From the rewards of the texts of each prompt ``[P, K]`` to their advantages, by ``baseline``."""


def advantages(rewards: Tensor, baseline: Baseline) -> Tensor:
    """The advantages ``[P, K]`` of P prompts' texts. ``UsageError`` if a reward is not finite."""
    if not rewards.isfinite().all():
        raise UsageError("a reward is not finite, and must be a number")
    return ADVANTAGES[baseline](rewards)


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of the divergence from the reference at each token that was drawn from the
    policy, in nats (Schulman, "Approximating KL divergence", 2020): ``r - 1 - log r`` of the ratio
    ``r`` of reference to policy. It is unbiased and never negative.

    As a term of the loss its expected gradient is that of the divergence of the policy from the
    reference's point of view, KL(reference, policy); both are 0 at the same policy.
    """
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio


def policy_loss(
    logprobs: Tensor,
    counted: Tensor,
    advantages: Tensor,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    clip: float = 0.0,
    kl: float = 0.0,
    by_length: bool = False,
) -> Tensor:
    """The loss of each text, ``[B]``, whose gradient is the policy gradient.

    ``logprobs`` ``[B, T]`` are those of the texts' tokens under the policy, and ``counted``
    ``[B, T]`` is where a token of a text stands. ``old`` are those under the policy that wrote
    them, without a gradient; ``None`` if it is the same policy. The probability of each token
    counts relative to ``old``, and with ``clip`` only from ``1 - clip`` to ``1 + clip`` where that
    would raise the gain (Schulman et al., 2017; GRPO: Shao et al., 2024, arXiv:2402.03300, eq. 3).
    ``kl`` is the weight of :func:`kl_estimate` from the ``reference``. ``by_length`` divides each
    loss by the number of the text's tokens.
    """
    ratio = (logprobs - (logprobs.detach() if old is None else old)).exp()
    advantage = advantages[:, None]
    gain = ratio * advantage
    if clip:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage)
    losses = -gain
    if kl and reference is not None:
        losses = losses + kl * kl_estimate(logprobs, reference)
    losses = torch.where(counted, losses, 0.0).sum(1)
    return losses / counted.sum(1).clamp_min(1) if by_length else losses
