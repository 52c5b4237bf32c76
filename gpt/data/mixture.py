"""Several sources mixed by weight.

An epoch has as many windows as all sources together. Each source has its share of them, by the
largest remainder, exactly. A source takes its own windows without replacement, in its own order:
a small one begins again, and a large one continues in the next epoch where it stopped.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.config import DataConfig, UsageError, WindowOrder, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import Batch, Windows
from gpt.data.corpus import Say, joined, open_corpus
from gpt.data.instructions import (
    Encoder,
    Instructions,
    is_instructions,
    prepare_instructions,
)
from gpt.data.order import Numbers, Order
from gpt.data.pieces import Split
from gpt.data.prepare import Progress, prepare
from gpt.data.prepared import Prepared, is_corpus
from gpt.data.reading import Reading
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import GPT2Tokenizer, Tokenizer
from gpt.data.tokenizer_training import tokenizer_of_corpus


def quotas(weights: list[float], total: int) -> list[int]:
    """``total`` in whole parts, by weight: each exact part is rounded down, and what remains goes
    to the largest remainders (Hamilton's method).
    """
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


@dataclass(frozen=True)
class Total:
    """The tokens of all sources."""

    n_tokens: int
    corpus: bytes
    """SHA-256 of what the sources and their shares are."""

    def __len__(self) -> int:
        return self.n_tokens


@dataclass(frozen=True)
class Mixture:
    """Several texts, or records of instructions, as tokens of one tokenizer."""

    tokenizer: Tokenizer
    names: tuple[str, ...]
    weights: tuple[float, ...]
    texts: tuple[Prepared | Instructions, ...]

    @property
    def train(self) -> Total:
        """The tokens to train on."""
        return self._total("train")

    @property
    def validation(self) -> Total:
        """The tokens that are held out."""
        return self._total("validation")

    def _total(self, split: Split) -> Total:
        shards = [getattr(text, split) for text in self.texts]
        key = hashlib.sha256(repr(self.weights).encode())
        for shard in shards:
            key.update(shard.corpus + str(len(shard)).encode())
        return Total(sum(map(len, shards)), key.digest())

    def windows(self, split: Split, context_length: int) -> "MixedWindows":
        """The windows of all sources; ``UsageError`` if one has less than one window."""
        windows = [text.windows(split, context_length) for text in self.texts]
        return MixedWindows(list(self.names), list(self.weights), windows)


def prepare_mixture(
    config: DataConfig,
    cache_dir: Path,
    *,
    tokenizer: Tokenizer | None = None,
    encoder: Encoder | None = None,
    progress: Progress = lambda fraction: None,
    say: Say = lambda text: None,
) -> Mixture:
    """As :func:`gpt.data.prepare.prepare`, for each source of ``config.mixture``. All have one
    tokenizer: one of characters has those of all sources, and a prepared source gives its own.
    Sources of instructions need an ``encoder``, and a given ``tokenizer``.
    """
    parts = config.parts()
    instructed = [is_instructions(part.data) for part in parts]
    if any(instructed) and tokenizer is None:
        name = parts[instructed.index(True)].name
        raise UsageError(
            f"data.mixture has instructions ({quoted(name)}), and needs init: a model whose "
            "tokenizer encodes them"
        )
    tokenizer = tokenizer or _tokenizer_of(config, [part.data for part in parts], say)
    texts: list[Prepared | Instructions] = []
    for number, part in enumerate(parts):

        def partly(fraction: float, done: int = number) -> None:
            progress((done + fraction) / len(parts))

        if instructed[number]:
            assert encoder is not None, "the caller gave no encoder"
            records = prepare_instructions(part.data, cache_dir, encoder, tokenizer=tokenizer)
            texts.append(records)
        else:
            text = prepare(part.data, cache_dir, tokenizer=tokenizer, progress=partly, say=say)
            texts.append(text)
    return Mixture(
        tokenizer, tuple(p.name for p in parts), tuple(p.weight for p in parts), tuple(texts)
    )


def _tokenizer_of(config: DataConfig, sources: list[DataConfig], say: Say) -> Tokenizer:
    """The tokenizer of all sources: that of the first one that is prepared, or a new one."""
    for each in sources:
        if is_corpus(each.source):
            return tokenizers.load(Path(each.source) / "tokenizer.json")
        if is_token_files(each.source):
            return GPT2Tokenizer.released()
    corpus = joined([open_corpus(each.source, Reading.of(each)) for each in sources])
    return tokenizer_of_corpus(config, corpus, say=say)


class MixedWindows:
    """The windows of several sources, numbered one source after the other."""

    def __init__(self, names: list[str], weights: list[float], parts: list[Windows]) -> None:
        self.names, self.weights, self.parts = names, weights, parts
        self.sizes = [len(part) for part in parts]
        self._starts = np.cumsum([0, *self.sizes])
        self.shares = quotas(weights, len(self))
        """How many windows of an epoch each source has."""
        if 0 in self.shares:
            name = names[self.shares.index(0)]
            raise UsageError(
                f"data.mixture gives {quoted(name)} less than one of {len(self):,} windows; give "
                "it a larger weight or leave it out"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """The batch of the windows with these numbers ``[B]``."""
        of = np.searchsorted(self._starts, windows, side="right") - 1
        order, batches = np.argsort(of, kind="stable"), []
        for part in np.unique(of):
            batches.append(self.parts[part].batch(windows[of == part] - self._starts[part]))
        back = torch.from_numpy(np.argsort(order))
        tokens, targets = (
            torch.cat([getattr(batch, name) for batch in batches])[back]
            for name in ("tokens", "targets")
        )
        if all(batch.documents is None for batch in batches):
            return Batch(tokens, targets)
        marks = [
            torch.zeros_like(batch.tokens) if batch.documents is None else batch.documents
            for batch in batches
        ]
        return Batch(tokens, targets, torch.cat(marks)[back])

    def spread(self, n: int) -> NDArray[np.int64]:
        """``n`` window numbers, evenly spread over each source by its share; all windows if ``n``
        is 0 or too large.
        """
        each = [0] * len(self.parts) if n == 0 else quotas(self.weights, n)
        spreads = [
            part.spread(max(1, count) if n else 0) + start
            for part, count, start in zip(self.parts, each, self._starts, strict=False)
        ]
        return np.concatenate(spreads)

    def by_source(self, n: int) -> Iterator[tuple[str, float, Windows, NDArray[np.int64]]]:
        """Of each source its name, its part of the weights, its windows, and which of them
        :meth:`spread` chooses.
        """
        chosen = self.spread(n)
        for name, weight, part, start in zip(
            self.names, self.weights, self.parts, self._starts, strict=False
        ):
            here = chosen[(chosen >= start) & (chosen < start + len(part))] - start
            yield name, weight / sum(self.weights), part, here

    def describe(self) -> list[str]:
        """Each source's share, for the user."""
        lines = []
        for name, share, size, part in zip(
            self.names, self.shares, self.sizes, self.parts, strict=True
        ):
            lines.append(
                f"mixture  {name}: {share / len(self):.1%} of the windows, {share:,} of an epoch's "
                f"{len(self):,}; it has {size:,}, which is {share / size:.2f} times all of them"
            )
            lines += part.describe()
        return lines


class MixedOrder:
    """Which windows of :class:`MixedWindows` each step takes, as a function of (seed, step).

    The sources take turns as evenly as their shares allow, so that each batch has the mixture too:
    of ``m`` places the source with ``n`` windows takes those at which ``place * n / m`` passes a
    whole number, and the sources after it share the others in the same way.
    """

    def __init__(
        self, windows: MixedWindows, *, batch_size: int, seed: int, kind: WindowOrder = "auto"
    ) -> None:
        self.windows, self.batch_size, self._n = windows, batch_size, len(windows)
        seeds = np.random.SeedSequence(seed).generate_state(len(windows.parts))
        self._orders = [
            Order(size, batch_size=batch_size, seed=int(own), kind=kind)
            for size, own in zip(windows.sizes, seeds, strict=True)
        ]
        # Products of two places need more than 64 bits in very large epochs.
        self._exact: type = np.int64 if self._n < 1 << 31 else object

    def at(self, places: Numbers) -> Numbers:
        """The windows at these places of the endless sequence, ``[n]``."""
        epochs, inside = np.divmod(places, self._n)
        inside, left = inside.astype(self._exact), self._n
        chosen = np.empty(len(places), np.int64)
        rest = np.arange(len(places))
        start = 0
        for share, size, order in zip(
            self.windows.shares, self.windows.sizes, self._orders, strict=True
        ):
            before = inside * share // left
            mine = ((inside + 1) * share // left > before).astype(bool)
            own = epochs[rest[mine]] * share + before[mine].astype(np.int64)
            chosen[rest[mine]] = order.at(own) + start
            inside, rest = (inside - before)[~mine], rest[~mine]
            left, start = left - share, start + size
        return chosen

    def step(self, step: int) -> Numbers:
        """As :meth:`gpt.data.order.Order.step`."""
        return self.at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each source's windows were taken before ``step``."""
        epoch, inside = divmod(step * self.batch_size, self._n)
        left, found, windows = self._n, {}, self.windows
        for name, share, size in zip(windows.names, windows.shares, windows.sizes, strict=True):
            taken = inside * share // left
            found[name] = (epoch * share + taken) / size
            inside, left = inside - taken, left - share
        return found
