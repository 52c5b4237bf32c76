"""The log-probabilities that the model gives to the tokens of a text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.generation.decode import evaluation_mode
from gpt.generation.sampling import describe
from gpt.model.gpt import GPT

POSITIONS_AT_ONCE = 512
"""Positions with logits in memory at the same time: 100 MB for GPT-2's vocabulary."""


@dataclass(frozen=True)
class Scored:
    """Log-probabilities in nats of a text's tokens, from the second on."""

    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]
    """The likeliest ids at each token, with their log-probabilities, the likeliest first."""
    entropies: list[float]
    """The entropy of each token's distribution, in nats."""


def score_targets(model: GPT, features: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target ``[N]`` in nats, ``[N]`` in float32.

    ``features`` ``[N, C]`` are the model's at the positions that predict the targets. The head runs
    over some positions at a time, so that a long text does not need all its logits in memory.
    """
    scores = []
    weight, config = model.head.weight, model.config
    is_plain = not config.logit_softcap and config.copy == "none"
    features = features.to(weight.dtype) if is_plain else features
    for x, target in zip(
        features.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True
    ):
        # V, N: faster on a CPU than N, V
        logits = (weight @ x.T).float() if is_plain else model.logits(x).float().T
        scores.append(logits.gather(0, target[None]).squeeze(0) - logits.logsumexp(dim=0))
    return torch.cat(scores)


@torch.inference_mode()
def score_tokens(model: GPT, ids: list[int], *, top: int, vocab_size: int) -> Scored:
    """The log-probability of each id after the first, given all ids before it, and the ``top``
    likeliest ids at each position.

    Of a longer text, only the last ``context_length + 1`` tokens count.
    """
    ids = ids[-(model.config.context_length + 1) :]
    tokens = torch.tensor([ids], device=model.device)
    scored = Scored([], [], [])
    if len(ids) < 2:
        return scored
    with evaluation_mode(model):
        features = model.features(tokens[:, :-1])[0]
    for x, target in zip(
        features.split(POSITIONS_AT_ONCE), tokens[0, 1:].split(POSITIONS_AT_ONCE), strict=True
    ):
        logits = model.logits(x).float()
        for logprob, likeliest in describe(logits, target, top, vocab_size):
            scored.logprobs.append(logprob or 0.0)
            scored.top.append(likeliest)
        logprobs = logits.log_softmax(dim=-1)
        scored.entropies.extend((-logprobs.exp() * logprobs).sum(dim=-1).tolist())
    return scored
