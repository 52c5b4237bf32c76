"""Perplexity and bits per byte of a text of any length, with a sliding window.

A window has the length of the model's context, and the next one starts ``stride`` tokens later.
Only targets that no earlier window has scored count. So each token counts once, after at least
``context_length - stride`` tokens (except at the beginning of the text). A smaller stride costs
more time and gives each token more context.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.config import CacheFormat, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import Corpus
from gpt.data.tokenizer import Ids, Tokenizer, encoder
from gpt.generation.logprobs import logprobs_of
from gpt.model.gpt import GPT

MIN_WINDOWS = 10
"""The fewest windows for a paired comparison: with fewer, a bootstrap is overconfident."""


@dataclass(frozen=True)
class TextScore:
    """A model's score on a text, window by window."""

    losses: NDArray[np.float64]
    """Sum of the nats of each window's targets, ``[windows]``."""
    counts: NDArray[np.int64]
    """Number of targets of each window, ``[windows]``."""
    n_bytes: int
    """Bytes of the targets' text."""
    by_position: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 0)))
    """Sum of the nats, and number of the targets, at each position in a window,
    ``[2, context]``."""
    nats: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Those of each target, ``[targets]``, if they were kept."""
    at: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The position in its window of each of these targets."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.losses.sum() / self.counts.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`loss`, computed over windows, because the tokens of a window are
        not independent.
        """
        n = len(self.losses)
        if n < 2:
            return math.nan
        residuals = self.losses - self.loss * self.counts
        return float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / self.counts.sum())

    def curve(self, n: int = 16) -> list[tuple[int, int, float]]:
        """The loss in nats per token in up to ``n`` equal ranges of positions in a window: the
        first position of each (from 1), the last, and the loss.
        """
        context = self.by_position.shape[1]
        ends = [round(context * i / n) for i in range(n + 1)]
        ranges = [(a, b) for a, b in itertools.pairwise(ends) if a < b]
        sums = [(a + 1, b, self.by_position[:, a:b].sum(axis=1)) for a, b in ranges]
        return [(a, b, float(nats / count)) for a, b, (nats, count) in sums if count]

    @property
    def perplexity(self) -> float:
        """The exponential of :attr:`loss`."""
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which models with different tokenizers can be compared by."""
        return float(self.losses.sum() / (math.log(2) * max(self.n_bytes, 1)))


def perplexity_of(loss: float) -> float:
    """The exponential of nats per token; infinite if it overflows."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def encode_text(tokenizer: Tokenizer, corpus: Corpus) -> Ids:
    """The ids of all documents, each with the tokenizer's first tokens, joined by end-of-text."""
    parts: list[Ids] = []
    for document in corpus.documents():
        if parts:
            parts.append(np.array([tokenizer.end_of_text], np.uint32))
        for number, piece in enumerate(document):
            parts.append(encoder(tokenizer, begins=number == 0)(piece))
    ids = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens, and a score needs at least 2")
    return ids


@torch.inference_mode()
def score_text(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Ids,
    *,
    context: int = 0,
    stride: int = 0,
    batch_size: int = 0,
    cache: CacheFormat = "float",
    keep: bool = False,
) -> TextScore:
    """The model's score on ``ids`` ``[n]``. Every token except the first counts once. With the
    ``cache`` int8, queries read keys and values as such a cache has them. With ``keep``, the score
    has the nats of each target (:func:`ensemble`).

    The defaults of 0 mean: windows of the model's context length, a ``stride`` of half the
    ``context``, and a ``batch_size`` of 1 window on a CPU (for its caches) and 8 elsewhere.
    ``UsageError`` for a stride that would skip tokens, and for a context beyond the model's where
    its positions end.
    """
    longest = model.config.context_length
    context = context or longest
    if context > (model.config.most_positions() or context):
        raise UsageError(
            f"context_length is {context}, and the model has learned positions for {longest} "
            "tokens alone: use at most as many, or a model with other positions"
        )
    stride = stride or max(1, context // 2)
    if not 0 < stride <= context:
        at = "the model's context_length" if context == longest else "the length of a window"
        raise UsageError(f"stride is {stride}, and must be from 1 to {at} ({context})")
    device = model.device
    batch_size = batch_size or (1 if device.type == "cpu" else 8)
    starts = list(range(0, max(1, len(ids) - 1 - context + stride), stride))
    losses, counts = np.zeros(len(starts)), np.zeros(len(starts), np.int64)
    by_position = np.zeros((2, context))
    n_kept = len(ids) - 1 if keep else 0
    nats, positions = np.zeros(n_kept), np.zeros(n_kept, np.int64)
    full = [i for i, start in enumerate(starts) if start + context < len(ids)]
    batches = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    batches += [[i] for i in range(len(full), len(starts))]  # the last one may be shorter
    for batch in batches:
        rows = np.stack([ids[starts[i] : starts[i] + context + 1] for i in batch])
        tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
        held = None
        if cache != "float":
            held = model.new_cache(len(batch), capacity=context, stored_as=cache)
        features = model.features(tokens[:, :-1], cache=held)
        for j, i in enumerate(batch):
            before = starts[i - 1] + context - starts[i] if i else 0  # scored by the window before
            targets = tokens[j, 1 + before :]
            logprobs = logprobs_of(model, features[j, before:], targets)
            losses[i], counts[i] = -logprobs.double().sum().item(), len(targets)
            own, end = -logprobs.double().cpu().numpy(), before + len(targets)
            by_position[0, before:end] += own
            by_position[1, before:end] += 1
            if keep:
                first = starts[i] + before
                nats[first : first + len(targets)] = own
                positions[first : first + len(targets)] = range(before, end)
    n_bytes = int(tokenizers.byte_lengths(tokenizer)[ids[1:]].sum())
    return TextScore(losses, counts, n_bytes, by_position, nats, positions)


def ensemble(scores: Sequence[TextScore]) -> TextScore:
    """The score of models together, whose probabilities of each token are averaged, from the kept
    nats of each. ``UsageError`` if they were not scored on the same windows.
    """
    one = scores[0]
    if any(not np.array_equal(one.counts, each.counts) for each in scores):
        raise UsageError(
            "the models of an ensemble were not scored on the same windows: they need the same "
            "tokenizer, context_length and stride"
        )
    nats = math.log(len(scores)) - np.logaddexp.reduce([-each.nats for each in scores])
    windows = np.repeat(np.arange(len(one.counts)), one.counts)
    losses, sums = np.zeros(len(one.counts)), np.zeros(one.by_position.shape[1])
    np.add.at(losses, windows, nats)
    np.add.at(sums, one.at, nats)
    by_position = np.stack([sums, one.by_position[1]])
    return TextScore(losses, one.counts, one.n_bytes, by_position, nats, one.at)


def paired_bootstrap(
    one: TextScore, two: TextScore, *, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The difference of two models' nats per token on one text, and its 95 % interval.

    Windows are drawn with replacement, the same ones for both models (Koehn, 2004). ``UsageError``
    if the two models were not scored on the same windows.
    """
    if not np.array_equal(one.counts, two.counts):
        raise UsageError(
            "the two models were not scored on the same windows: a paired comparison needs the "
            "same tokenizer, context_length and stride"
        )
    n = len(one.losses)
    if n < MIN_WINDOWS:
        raise UsageError(
            f"the text has {n} windows, and a paired comparison needs at least {MIN_WINDOWS}; use "
            "a longer text or a smaller stride"
        )
    draws = np.random.Generator(np.random.Philox(seed)).integers(0, n, (samples, n))
    difference = (one.losses - two.losses)[draws].sum(axis=1) / one.counts[draws].sum(axis=1)
    low, high = np.quantile(difference, [0.025, 0.975])
    return one.loss - two.loss, float(low), float(high)
