"""How likely given tokens are: the log-probabilities of a text's own tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.generation.decode import evaluation_mode
from gpt.generation.sampling import describe
from gpt.model.gpt import GPT

POSITIONS_AT_ONCE = 512
"""Positions whose logits are held together: 100 MB for GPT-2's vocabulary."""


@dataclass(frozen=True)
class Scored:
    """Log-probabilities in nats of a text's tokens from the second."""

    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]
    """At each the likeliest ids with their log-probabilities, the likeliest first."""
    entropies: list[float]
    """Of the distribution that each token was one of, in nats."""


def score_targets(model: GPT, features: Tensor, targets: Tensor) -> Tensor:
    """Of each target ``[N]`` its log-probability in nats, ``[N]`` in float32.

    ``features`` ``[N, C]`` are the model's where the targets are predicted. The head runs over some
    positions at a time, so that the logits of a long text are never all there.
    """
    scores = []
    weight = model.head.weight
    features = features.to(weight.dtype)
    for x, target in zip(
        features.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True
    ):
        logits = (weight @ x.T).float()  # V, N: on a CPU faster than N, V
        scores.append(logits.gather(0, target[None]).squeeze(0) - logits.logsumexp(dim=0))
    return torch.cat(scores)


@torch.inference_mode()
def score_tokens(model: GPT, ids: list[int], *, top: int, vocab_size: int) -> Scored:
    """The log-probability of each id but the first, given all before it, with the ``top``
    likeliest at each place.

    Of a text that is longer, the last ``context_length + 1`` tokens count.
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
