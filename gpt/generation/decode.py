"""Prefill and decode over a cache: token ids to more token ids, for many sequences at once.

Each prompt goes through the model once, and each new token once. Sequences of any lengths go
through together, each row of the batch at positions of its own with nothing but its own tokens in
its context; a row that ends makes room for the next prompt that waits. Equal prompts are read once,
and so is what the prompts of a batch begin with in common.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import GenerationConfig, UsageError
from gpt.generation.ahead import MOST, Steps, keep, steps_for
from gpt.generation.checks import (
    check_cache,
    check_number,
    check_prompt,
    check_sequences,
    check_settings,
)
from gpt.generation.context import Context, Reason
from gpt.generation.prefix import Prefix
from gpt.generation.sampling import (
    NO_NUMBERS,
    History,
    choose,
    describe,
    marked,
    new_draws,
    on_host,
    penalise,
)
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

PREFILL = 4096
"""Tokens of prompts that go through the model at once; of more, each row's next ones follow."""


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
    """Continues sequences, up to ``batch_size`` at a time: ``add`` prompts, then ``advance``.

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
        ahead: int | None = None,
    ) -> None:
        """``vocab_size`` is the tokenizer's: a model may have rows that no token has. Sequences end
        at ``end_of_text``, if it is given. Up to ``ahead`` tokens of a sequence come from one step,
        where nothing needs the host between them: by default 1, and on a GPU some, which it makes
        without waiting for the host.
        """
        self.model, self.config, self.batch_size = model, config, batch_size
        self.vocab_size = vocab_size or model.config.vocab_size
        self.end_of_text = end_of_text
        check_number("batch_size", batch_size, 1)
        check_settings(model, config, self.vocab_size)
        self._context = Context(model, config, end_of_text)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # as in the cache
        self._cache: KVCache | None = None
        self._history: History | None = None
        if config.has_penalties:
            self._history = History(self.vocab_size, self.model.device)
        on_gpu = model.device.type == "cuda"
        self._ahead = min(MOST, ahead or (MOST if on_gpu else 1))
        if config.has_penalties or config.logprobs is not None:
            self._ahead = 1  # what was chosen changes what is wanted next, or more of it is wanted
        self._steps: Steps | None = None
        self._prefix = Prefix(model)
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
        prompt = check_prompt(self.model, prompt, self.config, self.vocab_size)
        draws = new_draws(self.config.seed, prompt, sample)
        self._waiting.append(_Row(self._count, self._context.fit(prompt), draws))
        self._count += 1
        return self._count - 1

    def end(self, sequence: int) -> None:
        """Write no more of a sequence."""
        for row in self._rows:
            if row.sequence == sequence:
                row.ended = "stop"
                self._keep_steps()
                return
        self._waiting = deque(row for row in self._waiting if row.sequence != sequence)

    @torch.inference_mode()
    def advance(self) -> list[Token]:
        """The next token of each sequence that is running, or the next ones, the earlier ones
        first. The model is in evaluation mode meanwhile.
        """
        with evaluation_mode(self.model):
            if (n := self._room_ahead()) > 1:
                tokens = self._go_ahead(n)
            else:
                features = self._read()
                tokens = self._write(self.model.head(features)) if self._rows else []
        self._keep_steps()
        return tokens

    def _read(self) -> Tensor:
        """Read what has not been read: features of the next tokens, ``[B, C]``."""
        running = [i for i, row in enumerate(self._rows) if row.ended is None]
        order = _compacted([i for i in running if self._context.room(self._rows[i].tokens)])
        full = [i for i in running if not self._context.room(self._rows[i].tokens)]
        sliding = [self._rows[i] for i in full]
        if self._history is not None:
            self._history.keep(order + full)
        self._keep(order)
        features = []
        if self._rows:
            last = torch.tensor([row.tokens[-1:] for row in self._rows], device=self.model.device)
            features.append(self.model.features(last, cache=self._cache)[:, -1])
        for row in sliding:
            row.tokens = self._context.slide(row.tokens)
        arriving = sliding
        while self._waiting and len(self._rows) + len(arriving) < self.batch_size:
            arriving.append(self._waiting.popleft())
            if self._history is not None:
                self._history.add(arriving[-1].tokens)
        if arriving:
            order = sorted(range(len(arriving)), key=lambda i: len(arriving[i].tokens))
            if self._history is not None:
                n = len(self._rows)
                self._history.keep([*range(n), *(n + i for i in order)])
            arriving = [arriving[i] for i in order]
            self._make_room(arriving)
            upcoming = [row.tokens for row in itertools.islice(self._waiting, 1)]
            self._prefix.share([row.tokens for row in arriving], upcoming)
        features += [self._prefill(rows) for rows in _of_like_lengths(arriving)]
        return torch.cat(features) if features else torch.empty(0)

    def _keep(self, order: list[int]) -> None:
        """Row ``i`` becomes what row ``order[i]`` was."""
        if self._cache is not None:
            self._cache.reorder(order)
        self._rows = [self._rows[i] for i in order]

    def _room_ahead(self) -> int:
        """Steps for which no row needs the host: none ends for its length, slides, or makes
        room.
        """
        running = [row for row in self._rows if row.ended is None]
        if self._ahead == 1 or not running:
            return 0
        if self._waiting and len(running) < self.batch_size:
            return 0
        if any(row.written < self.config.min_new_tokens for row in running):
            return 0
        most = self.config.max_new_tokens
        room = (min(most - row.written, self._context.room(row.tokens)) for row in running)
        return min(self._ahead, *room)

    def _go_ahead(self, n: int) -> list[Token]:
        """The next ``n`` tokens of each row that does not end before."""
        self._keep(_compacted([i for i, row in enumerate(self._rows) if row.ended is None]))
        rows = list(self._rows)
        drawn = bool(self.config.temperature)
        numbers = [[row.draws.random() if drawn else 0.0 for row in rows] for _ in range(n)]
        expected = max(self.config.max_new_tokens - row.written for row in rows)
        assert self._steps is not None, "rows are read before"
        chosen = self._steps.take(
            self.model, [row.tokens[-1] for row in rows], numbers, expected=expected
        )
        if chosen is None:
            raise UsageError(NO_NUMBERS)
        pairs = (pair for step in chosen for pair in zip(rows, step, strict=True))
        return [self._written(row, token) for row, token in pairs if row.ended is None]

    def _prefill(self, arriving: list[_Row]) -> Tensor:
        """Read whole prompts, each different one once, and put them into the cache."""
        prompts: list[list[int]] = []
        places = []
        for row in arriving:
            if row.tokens not in prompts:
                prompts.append(row.tokens)
            places.append(prompts.index(row.tokens))
        cache = self._prefix.new_cache(prompts)
        start = cache.length
        ends = [len(prompt) - start for prompt in prompts]
        padded = [
            prompt[start:] + [0] * (max(ends) - n) for prompt, n in zip(prompts, ends, strict=True)
        ]
        ids = torch.tensor(padded, device=self.model.device)
        chunks = ids.split(max(1, PREFILL // len(prompts)), dim=1)
        features = torch.cat([self.model.features(chunk, cache=cache) for chunk in chunks], dim=1)
        cache.truncate([len(prompt) for prompt in prompts])
        assert self._cache is not None
        self._cache.add(cache, places)
        self._rows += arriving
        return features[places, [ends[place] - 1 for place in places]]

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
        check_cache(self.model, rows, length)
        if self._ahead > 1:
            self._steps = steps_for(
                self.model, self.config, rows=rows, length=length, vocab_size=self.vocab_size
            )
            self._cache = self._steps.cache
        else:
            self._cache = self.model.new_cache(rows, capacity=length)
            self._cache.reorder([])
        if old is not None:
            self._cache.add(old)

    def _keep_steps(self) -> None:
        """Once all is done, leave the cache and its graphs to the model's next texts."""
        if self._steps is not None and not self.busy:
            keep(self.model, self._steps)
            self._steps = self._cache = None

    def _longest(self, rows: list[_Row]) -> int:
        """Tokens that the longest of ``rows`` may come to."""
        most = max(len(row.tokens) - row.written for row in rows) + self.config.max_new_tokens
        return min(self._context.length, most)

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
        ids = on_host(marked(chosen, processed))
        if self._history is not None:
            self._history.append(chosen)
        details = describe(every, chosen, config.logprobs, self.vocab_size)
        tokens = zip(rows, ids, details, strict=True)
        return [self._written(row, token, *detail) for row, token, detail in tokens]

    def _written(self, row: _Row, token: int, *details: Any) -> Token:
        """The row's next token, counted."""
        row.tokens.append(token)
        row.written += 1
        row.ended = self._context.ended(row.tokens, row.written)
        return Token(row.sequence, token, row.ended, *details)


def decode(
    model: GPT, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any
) -> Iterator[Token]:
    """The new tokens of every prompt, ``config.num_samples`` sequences each, as they are made.

    Sequence ``i`` continues prompt ``i // num_samples``; ``options`` are :class:`Decoder`'s.
    """
    decoder = Decoder(model, config, **options)
    n = config.num_samples
    check_sequences(len(prompts) * n, sum(map(len, prompts)) * n)
    for prompt in prompts:
        for sample in range(config.num_samples):
            decoder.add(prompt, sample=sample)
    while decoder.busy:
        yield from decoder.advance()


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


def _of_like_lengths(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Groups of ``rows``, ordered by length, none of which pads a row by much."""
    group: list[_Row] = []
    for row in rows:
        if group and len(row.tokens) > 16 + 1.25 * len(group[0].tokens):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _compacted(rows: list[int]) -> list[int]:
    """``rows``, ascending, in an order that moves the fewest: what is behind fills the gaps."""
    n, held = len(rows), set(rows)
    behind = iter(row for row in rows if row >= n)
    return [i if i in held else next(behind) for i in range(n)]
