"""From logits to the next token: pure functions on logits ``[B, V]``.

They apply in the order of Hugging Face's processors: bias and bans, repetition, presence and
frequency penalties, minimum length; then, unless the temperature is 0, temperature, top-k, top-p,
min-p, draw. A filter sets the logits of the tokens that it drops to minus infinity.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import SamplingConfig, UsageError

NO_NUMBERS = (
    "the model's logits are not numbers: its weights are damaged or too large for this precision "
    "(float32 has the widest range), or every token is banned"
)
UNKNOWN = -1
"""Stands for a token whose logits are not numbers."""
Details = tuple[float | None, tuple[tuple[int, float], ...]]
"""A token's log-probability, and the likeliest ids with their log-probabilities."""


def new_draws(
    seed: int | None, prompt: Sequence[int], sample: int, *, guesses: bool = False
) -> np.random.Generator:
    """The random numbers of one sequence, from its seed, its prompt and the sample's number.

    They do not depend on the rest of the batch. A draft's ``guesses`` get other numbers than the
    model's draws. Without a seed, the numbers differ at every call.
    """
    if seed is None:
        return np.random.default_rng()
    entropy = [seed, sample, int(guesses), *prompt]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add numbers to the logits of some tokens; minus infinity bans a token."""
    ids = torch.tensor(list(bias), device=logits.device)
    numbers = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(-1, ids, numbers.expand(*logits.shape[:-1], -1))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """For the tokens in ``seen`` ``[B, V]``, divide positive logits by ``penalty`` and multiply
    negative ones by it (CTRL, arXiv:1909.05858).
    """
    punished = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, punished, logits)


def penalise_counts(logits: Tensor, counts: Tensor, *, presence: float, frequency: float) -> Tensor:
    """Subtract ``presence`` from the logits of tokens with a count in ``counts`` ``[B, V]``, and
    ``frequency`` times the count (OpenAI's API).
    """
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the ``k`` likeliest tokens, and those that tie with the last of them; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least ``p``: the
    nucleus (arXiv:1904.09751).

    It has at least one token. Among tokens that tie, lower ids come first.
    """
    if p >= 1:
        return logits
    # Sum from the least likely up, like Hugging Face; flipped, so that lower ids win ties.
    ordered, ids = logits.flip(-1).sort(dim=-1, stable=True)
    tail = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    tail[..., -1].fill_(False)
    dropped = torch.empty_like(tail).scatter_(-1, ids, tail)
    return logits.masked_fill(dropped.flip(-1), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens that are at least ``p`` times as likely as the likeliest one
    (arXiv:2407.01082).
    """
    if p == 0:
        return logits
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def next_token_probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The distribution that the next token is drawn from, ``[B, V]`` in float32. At temperature 0,
    only the likeliest token has a probability.
    """
    logits = logits.float()
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    kept = keep_top_p(keep_top_k(logits / config.temperature, config.top_k), config.top_p)
    return keep_min_p(kept, config.min_p).softmax(dim=-1)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which draws are decided: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(probabilities: Tensor, numbers: Sequence[float] | Tensor) -> Tensor:
    """Draw one token for each row, ``[B, V]`` to ``[B]``: the first token whose cumulative
    probability is above the row's number in [0, 1).
    """
    exact = exact_dtype(probabilities.device)
    cumulative = probabilities.to(exact).cumsum(dim=-1)
    wanted = torch.as_tensor(numbers, dtype=exact, device=probabilities.device)[:, None]
    # Relative to the sum, which may differ from 1 by rounding.
    below = (cumulative <= wanted * cumulative[:, -1:]).sum(dim=-1)
    return below.clamp_max_(len(probabilities[0]) - 1)


def choose(logits: Tensor, config: SamplingConfig, numbers: Sequence[float] | Tensor) -> Tensor:
    """Choose one token for each row, ``[B, V]`` to ``[B]``: the likeliest at temperature 0, else a
    draw with the row's number.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(next_token_probabilities(logits, config), numbers)


def finite(logits: Tensor) -> Tensor:
    """``logits``, unchanged; ``UsageError`` if the highest of a row is not a finite number."""
    if not logits.amax(dim=-1).isfinite().all():
        raise UsageError(NO_NUMBERS)
    return logits


def marked(tokens: Tensor, logits: Tensor) -> Tensor:
    """``tokens`` ``[B]``, with ``UNKNOWN`` where the row's highest logit is not a finite number."""
    return tokens.where(logits.amax(dim=-1).isfinite(), UNKNOWN)


def on_host(tokens: Tensor) -> list[int]:
    """Copy :func:`marked` tokens to the host; ``UsageError`` if one is ``UNKNOWN``."""
    ids: list[int] = tokens.tolist()
    if UNKNOWN in ids:
        raise UsageError(NO_NUMBERS)
    return ids


def describe(logits: Tensor, tokens: Tensor, top: int | None, vocab_size: int) -> list[Details]:
    """The log-probability of each token ``[B]`` under the model's ``logits`` ``[B, V]``, and the
    ``top`` likeliest ids below ``vocab_size`` with their log-probabilities. The softmax covers all
    rows of the model, like the loss. Details are empty if ``top`` is ``None``.
    """
    if top is None:
        return [(None, ())] * len(tokens)
    logprobs = logits.float().log_softmax(dim=-1)[:, :vocab_size]
    own = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
    best = logprobs.topk(min(top, vocab_size), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    likeliest = (tuple(zip(ids, values, strict=True)) for ids, values in pairs)
    return list(zip(own, likeliest, strict=True))


class History:
    """The tokens that each row already has, for the penalties."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        """Whether a token is in the prompt or was written, ``[B, V]``."""
        self.counts = torch.zeros(0, vocab_size, device=device)
        """How often a token was written, ``[B, V]``."""

    def add(self, prompt: Sequence[int]) -> None:
        """Add a row that begins with ``prompt``."""
        row = self.seen.new_zeros(1, self.seen.shape[1])
        row[0, torch.tensor(prompt, dtype=torch.int64, device=row.device)] = True
        self.seen = torch.cat([self.seen, row])
        self.counts = torch.cat([self.counts, torch.zeros_like(row, dtype=self.counts.dtype)])

    def keep(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        wanted = torch.tensor(rows, dtype=torch.int64, device=self.seen.device)
        self.seen, self.counts = self.seen[wanted], self.counts[wanted]

    def of(self, rows: Sequence[int]) -> "History":
        """The history of some rows, as a copy."""
        other = copy.copy(self)
        other.keep(rows)
        return other

    def after_each(self, tokens: Tensor) -> "History":
        """The history of ``n + 1`` rows: the only row, now and after each of ``tokens`` ``[n]``."""
        other = copy.copy(self)
        written = F.one_hot(tokens, self.seen.shape[1]).cumsum(dim=0)
        written = F.pad(written, (0, 0, 1, 0))
        other.seen, other.counts = self.seen | (written > 0), self.counts + written
        return other

    def append(self, tokens: Tensor) -> None:
        """Count the next token of each row, ``[B]``."""
        self.seen.scatter_(1, tokens[:, None], True)
        self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(self.counts[:, :1]))


def penalise(
    logits: Tensor,
    config: SamplingConfig,
    history: History | None = None,
    *,
    early: Sequence[int] = (),
    ends: Collection[int] = (),
) -> Tensor:
    """Apply bias, bans, penalties and minimum length, in the order of the module.

    Without a ``history``, no penalties apply. The rows in ``early`` get none of the ids in
    ``ends``.
    """
    if bias := config.bias | dict.fromkeys(config.ban, -math.inf):
        logits = add_bias(logits, bias)
    if history is not None:
        logits = penalise_repetition(logits, history.seen, config.repetition_penalty)
        logits = penalise_counts(
            logits,
            history.counts,
            presence=config.presence_penalty,
            frequency=config.frequency_penalty,
        )
    if len(early) and ends:
        logits = logits.clone()
        for end in ends:
            logits[list(early), end] = -torch.inf
    return logits
