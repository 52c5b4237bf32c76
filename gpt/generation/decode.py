"""Prefill and decode over a cache: token ids to more token ids, for many sequences at once.

Each prompt goes through the model once, and each new token once. Sequences of any lengths go
through together, each row of the batch at positions of its own with nothing but its own tokens in
its context; a row that ends makes room for the next prompt that waits. Equal prompts are read once,
and so is what the prompts of a batch begin with in common.

When the context of a sequence is full, one of two policies holds:

``stop``
    ends it. Every token was predicted from all that stood before it.
``slide``
    keeps the newer half of the context, reads it again from position 0, and goes on. Positions are
    absolute, so cached keys cannot be moved; the price is one prefill of ``context_length / 2``
    tokens for each ``context_length / 2`` new ones, and that right after a slide the model sees
    only that half.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gpt.config import GenerationConfig, UsageError
from gpt.generation.sampling import History, choose, describe, new_draws, penalise
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

Reason = Literal["end_of_text", "length", "context", "stop"]

WORTH_SHARING = 8
"""Tokens: a shorter common beginning is not read apart."""


@dataclass(frozen=True)
class Token:
    """One new token of one sequence."""

    sequence: int
    """The number that :meth:`Decoder.add` gave."""
    id: int
    ended: Reason | None
    """Why it is the sequence's last one, if it is."""
    logprob: float | None = None
    """Its log-probability in nats, as the model has it: before bias, penalties and temperature."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, the likeliest first."""
    score: float | None = None
    """Of a beam, with its last token."""


@dataclass(eq=False)
class _Row:
    sequence: int
    tokens: list[int]  # what the model sees, the last one not read yet
    draws: np.random.Generator
    written: int = 0
    ended: Reason | None = None


class Decoder:
    """Continues sequences, up to ``batch_size`` at a time: ``add`` prompts, then ``step``.

    The tokens of a sequence are the same whatever else is in the batch, as far as rounding lets
    them: matrix products of another size round otherwise, which float32 hardly ever shows and
    bfloat16 sometimes does where two tokens are about equally likely.
    """

    def __init__(
        self,
        model: GPT,
        config: GenerationConfig,
        *,
        batch_size: int = 32,
        vocab_size: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        """``vocab_size`` is the tokenizer's: a model may have rows that no token has. Sequences end
        at ``end_of_text``, if it is given.
        """
        self.model, self.config, self.batch_size = model, config, batch_size
        self.vocab_size = vocab_size or model.config.vocab_size
        self.end_of_text = end_of_text
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, and must be at least 1")
        check_settings(model, config, self.vocab_size)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # as in the cache
        self._cache: KVCache | None = None
        self._history: History | None = None
        if config.has_penalties:
            self._history = History(self.vocab_size, self.model.device)
        self._prefix: list[int] = []
        self._prefix_cache: KVCache | None = None
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting) or any(row.ended is None for row in self._rows)

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Queue a sequence that begins with ``prompt``, and return its number.

        Sequences of one prompt and one seed differ by their ``sample``. Under ``slide`` the last
        ``context_length`` tokens of a longer prompt count; under ``stop`` that is a ``UsageError``,
        and so is an empty one, or an id that is out of the vocabulary.
        """
        check_prompt(self.model, prompt, self.config, self.vocab_size)
        context = self.model.config.context_length
        draws = new_draws(self.config.seed, prompt, sample)
        self._waiting.append(_Row(self._count, list(prompt)[-context:], draws))
        self._count += 1
        return self._count - 1

    def end(self, sequence: int) -> None:
        """Write no more of a sequence."""
        for row in self._rows:
            if row.sequence == sequence:
                row.ended = "stop"
                return
        self._waiting = deque(row for row in self._waiting if row.sequence != sequence)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next token of each sequence that is running. The model is in evaluation mode
        meanwhile.
        """
        with evaluation_mode(self.model):
            features = self._read()
            return self._write(self.model.head(features)) if self._rows else []

    def _read(self) -> Tensor:
        """Read what has not been read: features of the next tokens, ``[B, C]``."""
        context = self.model.config.context_length
        running = [i for i, row in enumerate(self._rows) if row.ended is None]
        order = _compacted([i for i in running if len(self._rows[i].tokens) <= context])
        full = [i for i in running if len(self._rows[i].tokens) > context]
        if self._cache is not None:
            self._cache.reorder(order)
        if self._history is not None:
            self._history.keep(order + full)
        sliding = [self._rows[i] for i in full]
        self._rows = [self._rows[i] for i in order]
        features = []
        if self._rows:
            last = torch.tensor([row.tokens[-1:] for row in self._rows], device=self.model.device)
            features.append(self.model.features(last, cache=self._cache)[:, -1])
        for row in sliding:
            row.tokens = row.tokens[-max(1, context // 2) :]
        arriving = sliding
        while self._waiting and len(self._rows) + len(arriving) < self.batch_size:
            arriving.append(self._waiting.popleft())
            if self._history is not None:
                self._history.add(arriving[-1].tokens)
        if arriving:
            features.append(self._prefill(arriving))
        return torch.cat(features) if features else torch.empty(0)

    def _prefill(self, arriving: list[_Row]) -> Tensor:
        """Read whole prompts, each different one once, and put them into the cache."""
        prompts: list[list[int]] = []
        places = []
        for row in arriving:
            if row.tokens not in prompts:
                prompts.append(row.tokens)
            places.append(prompts.index(row.tokens))
        cache = self._shared_beginning(prompts)
        start = cache.length
        ends = [len(prompt) - start for prompt in prompts]
        padded = [
            prompt[start:] + [0] * (max(ends) - n) for prompt, n in zip(prompts, ends, strict=True)
        ]
        features = self.model.features(torch.tensor(padded, device=self.model.device), cache=cache)
        cache.truncate([len(prompt) for prompt in prompts])
        self._make_room(arriving)
        assert self._cache is not None
        self._cache.add(cache, places)
        self._rows += arriving
        return features[places, [ends[place] - 1 for place in places]]

    def _shared_beginning(self, prompts: list[list[int]]) -> KVCache:
        """A cache of a row a prompt that holds what they begin with in common, or nothing."""
        longest = max(map(len, prompts))
        # What the first and the last in order have in common, all between them have. The next one
        # counts too: it may begin with the same.
        seen = prompts + [row.tokens for row in itertools.islice(self._waiting, 1)]
        shared = common(min(seen)[:-1], max(seen)[:-1])
        known = min(len(common(p[:-1], self._prefix)) for p in prompts)
        if len(seen) > 1 and len(shared) - known >= WORTH_SHARING:
            self._prefix, known = shared, len(shared)
            self._prefix_cache = self.model.new_cache(1, capacity=len(shared))
            ids = torch.tensor([shared], device=self.model.device)
            self.model.features(ids, cache=self._prefix_cache)
        if self._prefix_cache is None or known < WORTH_SHARING:
            return self.model.new_cache(len(prompts), capacity=longest)
        capacity = max(longest, self._prefix_cache.length)
        cache = self._prefix_cache.expand(len(prompts), capacity=capacity)
        cache.truncate(known)
        return cache

    def _make_room(self, arriving: list[_Row]) -> None:
        """A cache that takes the ``arriving`` rows as well, and those that wait."""
        old, rows = self._cache, len(self._rows) + len(arriving)
        length = self._longest(arriving)
        if old is not None and rows <= old.max_batch_size and length <= old.capacity:
            return
        rows = min(self.batch_size, rows + len(self._waiting))
        length = self._longest([*arriving, *self._waiting])
        if old is not None:
            rows, length = max(rows, old.max_batch_size), max(length, old.capacity)
        self._cache = self.model.new_cache(rows, capacity=length)
        self._cache.reorder([])
        if old is not None:
            self._cache.add(old)

    def _longest(self, rows: list[_Row]) -> int:
        """Tokens that the longest of ``rows`` may come to."""
        most = max(len(row.tokens) - row.written for row in rows) + self.config.max_new_tokens
        return min(self.model.config.context_length, most)

    def _write(self, logits: Tensor) -> list[Token]:
        """Choose the next token of each row, from logits ``[B, V]`` of all the model's rows."""
        config, rows, every = self.config, self._rows, logits
        logits = logits[:, : self.vocab_size]
        early = [i for i, row in enumerate(rows) if row.written < config.min_new_tokens]
        processed = penalise(
            logits, config, self._history, early=early, end_of_text=self.end_of_text
        )
        numbers = [row.draws.random() for row in rows] if config.temperature else []
        chosen = choose(processed, config, numbers)
        if self._history is not None:
            self._history.append(chosen)
        details = describe(every, chosen, config.logprobs, self.vocab_size)
        tokens = []
        for row, token, detail in zip(rows, chosen.tolist(), details, strict=True):
            row.tokens.append(token)
            row.written += 1
            if token == self.end_of_text:
                row.ended = "end_of_text"
            elif row.written == config.max_new_tokens:
                row.ended = "length"
            elif (
                config.past_context == "stop" and len(row.tokens) > self.model.config.context_length
            ):
                row.ended = "context"
            tokens.append(Token(row.sequence, token, row.ended, *detail))
        return tokens


def decode(
    model: GPT, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: int
) -> Iterator[Token]:
    """The new tokens of every prompt, ``config.num_samples`` sequences each, as they are made.

    Sequence ``i`` continues prompt ``i // num_samples``; ``options`` are :class:`Decoder`'s.
    """
    decoder = Decoder(model, config, **options)
    for prompt in prompts:
        for sample in range(config.num_samples):
            decoder.add(prompt, sample=sample)
    while decoder.busy:
        yield from decoder.step()


@contextmanager
def evaluation_mode(model: GPT) -> Iterator[None]:
    """The model in evaluation mode, and then in the mode that it was in."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def check_settings(model: GPT, config: GenerationConfig, vocab_size: int) -> None:
    """``UsageError`` for a bias or a ban of what is no token, and for more tokens than the model
    has.
    """
    if vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size:,} tokens, and the model {model.config.vocab_size:,}"
        )
    check_ids("bias", config.bias, vocab_size)
    check_ids("ban", config.ban, vocab_size)


def check_prompt(
    model: GPT, prompt: Sequence[int], config: GenerationConfig, vocab_size: int
) -> None:
    """``UsageError`` for a prompt that cannot be continued."""
    context = model.config.context_length
    if not len(prompt):
        raise UsageError("the prompt has no tokens, and there must be one to continue")
    if config.past_context == "stop" and len(prompt) > context:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, and the model's context_length is "
            f"{context:,}; shorten it, or let past_context be 'slide'"
        )
    check_ids("the prompt", prompt, vocab_size)


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """``UsageError`` for an id that no token has."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UsageError(
                f"{what} has the token id {i}, and the vocabulary ends at {vocab_size - 1}"
            )


def common(one: list[int], two: list[int]) -> list[int]:
    """What both begin with."""
    n = min(len(one), len(two))
    return one[: next((i for i in range(n) if one[i] != two[i]), n)]


def _compacted(rows: list[int]) -> list[int]:
    """``rows``, ascending, in an order that moves the fewest: what is behind fills the gaps."""
    n, held = len(rows), set(rows)
    behind = iter(row for row in rows if row >= n)
    return [i if i in held else next(behind) for i in range(n)]
