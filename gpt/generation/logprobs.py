"""The log-probabilities that the model gives to the tokens of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.generation.prefill import evaluation_mode
from gpt.generation.sampling import describe
from gpt.model.gpt import GPT

POSITIONS_AT_ONCE = 512
"""Positions with logits in memory at the same time: 100 MB for GPT-2's vocabulary."""


class TokenDetails(NamedTuple):
    """What the model predicted where a token of a text stands."""

    logprob: float
    """The token's log-probability, in nats."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with their log-probabilities, the likeliest first."""
    entropy: float
    """The entropy of the distribution, in nats."""

    def of_top(self, top: int | None) -> "TokenDetails":
        """These details with the ``top`` likeliest ids alone."""
        return self if top is None else self._replace(top=self.top[:top])


@dataclass(frozen=True)
class Describer:
    """Gives the details of tokens: the ``top`` likeliest ids are those below ``vocab_size``."""

    model: GPT
    top: int
    vocab_size: int

    def of(self, features: Tensor, targets: Tensor) -> list[TokenDetails]:
        """Those of each target ``[N]``. ``features`` ``[N, C]`` are the model's at the positions
        that predict the targets. The head runs over some positions at a time.
        """
        found: list[TokenDetails] = []
        pieces = features.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE)
        for x, target in zip(*pieces, strict=True):
            logits = self.model.logits(x).float()
            logprobs = logits.log_softmax(dim=-1)
            entropies = (-logprobs.exp() * logprobs).sum(dim=-1).tolist()
            details = describe(logits, target, self.top, self.vocab_size)
            for (logprob, likeliest), entropy in zip(details, entropies, strict=True):
                found.append(TokenDetails(logprob or 0.0, likeliest, entropy))
        return found

    @torch.inference_mode()
    def of_text(self, ids: list[int]) -> list[TokenDetails]:
        """Those of each id after the first, given all ids before it. Of a longer text, only the
        last ``context_length + 1`` tokens count.
        """
        ids = ids[-(self.model.config.context_length + 1) :]
        if len(ids) < 2:
            return []
        tokens = torch.tensor([ids], device=self.model.device)
        with evaluation_mode(self.model):
            features = self.model.features(tokens[:, :-1])[0]
        return self.of(features, tokens[0, 1:])


class Reading:
    """Collects the details of prompts while the model reads them, so that it reads them once."""

    def __init__(
        self, describer: Describer, prompts: Sequence[Sequence[int]], *, start: int = 0
    ) -> None:
        """The first ``start`` tokens of each prompt are in the cache already. An empty prompt
        stands for a row whose details nobody wants.
        """
        self.describer, self.prompts, self.start = describer, prompts, start
        self.found: list[list[TokenDetails]] = [[] for _ in prompts]
        """Those of each prompt's tokens behind number ``start``."""

    def add(self, at: int, features: Tensor) -> None:
        """``features`` ``[B, n, C]`` of the next ``n`` tokens, the first of which is number ``at``
        behind ``start``. What is behind a prompt's end is padding.
        """
        first = self.start + at + 1
        targets = [list(prompt[first : first + features.shape[1]]) for prompt in self.prompts]
        rows = [features[row, : len(ids)] for row, ids in enumerate(targets)]
        ids = [i for own in targets for i in own]
        if ids:
            wanted = torch.tensor(ids, device=features.device)
            details = iter(self.describer.of(torch.cat(rows), wanted))
            for found, own in zip(self.found, targets, strict=True):
                found.extend(next(details) for _ in own)


def logprobs_of(model: GPT, features: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target ``[N]`` in nats, ``[N]`` in float32.

    ``features`` ``[N, C]`` are the model's at the positions that predict the targets. The head runs
    over some positions at a time, so that a long text does not need all its logits in memory.
    """
    logprobs = []
    weight, config = model.head.weight, model.config
    is_plain = not config.logit_softcap and config.copy == "none"
    features = features.to(weight.dtype) if is_plain else features
    for x, target in zip(
        features.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True
    ):
        # V, N: faster on a CPU than N, V
        logits = (weight @ x.T).float() if is_plain else model.logits(x).float().T
        logprobs.append(logits.gather(0, target[None]).squeeze(0) - logits.logsumexp(dim=0))
    return torch.cat(logprobs)
