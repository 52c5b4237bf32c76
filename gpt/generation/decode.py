"""Prefill and decode over a cache: token ids to more token ids, for many sequences at once.

The model reads each prompt once, and then each new token once. Sequences of any lengths go through
together. Each row of the batch has its own positions, and its context holds only its own tokens.
When a sequence ends, the next waiting one takes its row. Equal prompts are read once, and so is
the beginning that the prompts of a batch share.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import GenerationConfig, UsageError
from gpt.generation.ahead import MOST, TokenLoop, keep, loop_for
from gpt.generation.checks import (
    check_cache,
    check_number,
    check_prompt,
    check_sequences,
    check_settings,
)
from gpt.generation.context import Context, Ends, Reason
from gpt.generation.logprobs import Describer, Reading, TokenDetails
from gpt.generation.prefill import evaluation_mode, read
from gpt.generation.prefix import Prefix
from gpt.generation.sampling import (
    NO_NUMBERS,
    Details,
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


@dataclass(frozen=True)
class Token:
    """One new token of one sequence."""

    sequence: int
    """The number that :meth:`Decoder.add` gave."""
    id: int
    ended: Reason | None
    """Why the sequence ends with this token, if it does."""
    logprob: float | None = None
    """The model's log-probability in nats, before bias, penalties and temperature."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids with their log-probabilities, the likeliest first."""
    score: float | None = None
    """The beam's score, on its last token."""
    prompt_details: list[TokenDetails] | None = None
    """Those of the prompt's tokens from the second on, with the first token of sample 0, if
    ``logprobs`` is set; of the part of the prompt that the model reads."""


@dataclass(eq=False)
class _Row:
    sequence: int
    sample: int
    tokens: list[int]  # the ones in the context, and a last one that the model has not read
    draws: np.random.Generator
    written: int = 0
    ended: Reason | None = None
    prompt_details: list[TokenDetails] | None = None  # until the first token is written

    @property
    def wants_details(self) -> bool:  # of its prompt
        return self.written == 0 and self.sample == 0


class Decoder:
    """Continues sequences, up to ``batch_size`` at a time: ``add`` prompts, then ``advance``.

    The tokens of a sequence do not depend on the rest of the batch, except for rounding. Matrix
    products of another size round differently, which can change a token where two are about equally
    likely: almost never in float32, sometimes in bfloat16.
    """

    def __init__(
        self,
        model: GPT,
        config: GenerationConfig,
        *,
        batch_size: int = 32,
        vocab_size: int | None = None,
        end_of_text: Ends = None,
        ahead: int | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        """``vocab_size`` is the tokenizer's; the model may have more rows than that. Sequences end
        at ``end_of_text``, one id or any of several. The device chooses up to ``ahead`` tokens of a
        sequence before the host looks at them (:mod:`gpt.generation.ahead`): by default 1, on a GPU
        several. ``prefix`` is what another decoder of the model read and
        :meth:`remember` kept.
        """
        self.model, self.config, self.batch_size = model, config, batch_size
        self.vocab_size = vocab_size or model.config.vocab_size
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
            self._ahead = 1  # the loop computes neither
        self._loop: TokenLoop | None = None
        self._describer = None
        if config.logprobs is not None:
            self._describer = Describer(model, config.logprobs, self.vocab_size)
            prefix = None  # what was read without details has none
        self._prefix = prefix or Prefix(model, self._describer, cache=config.cache)
        self._remembers = prefix is not None
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether a sequence is waiting or running."""
        return bool(self._waiting) or any(row.ended is None for row in self._rows)

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Queue a sequence that begins with ``prompt``, and return its number.

        With one seed, the sequences of a prompt differ by their ``sample``. Raises ``UsageError``
        for an empty prompt, and for an id outside of the vocabulary. If the prompt is longer than
        the context, ``slide`` reads its last ``context_length`` tokens, and ``stop`` raises.
        """
        prompt = check_prompt(self.model, prompt, self.config, self.vocab_size)
        draws = new_draws(self.config.seed, prompt, sample)
        self._waiting.append(_Row(self._count, sample, self._context.fit(prompt), draws))
        self._count += 1
        return self._count - 1

    def end(self, sequence: int) -> None:
        """Stop a sequence; it gets no more tokens."""
        for row in self._rows:
            if row.sequence == sequence:
                row.ended = "stop"
                self._leave_cache()
                return
        self._waiting = deque(row for row in self._waiting if row.sequence != sequence)

    @torch.inference_mode()
    def advance(self) -> list[Token]:
        """The next token of each running sequence, or several of each if the device chooses ahead,
        in the order of their positions. The model is in evaluation mode meanwhile.
        """
        with evaluation_mode(self.model):
            if (n := self._room_ahead()) > 1:
                tokens = self._write_ahead(n)
            else:
                features = self._read()
                tokens = self._write(self.model.logits(torch.cat(features))) if features else []
        self._leave_cache()
        return tokens

    def _read(self) -> list[Tensor]:
        """Read the tokens that the model has not read: the features after each row, ``[B, C]``."""
        going_on, arriving = self._next_rows()
        self._keep(going_on)
        features = [self._read_last_tokens()] if self._rows else []
        if arriving:
            self._make_room(arriving)
            upcoming = [row.tokens for row in itertools.islice(self._waiting, 1)]
            self._prefix.read_common([row.tokens for row in arriving], upcoming)
        return features + [self._prefill(rows) for rows in _of_like_lengths(arriving)]

    def _next_rows(self) -> tuple[list[int], list[_Row]]:
        """Slide the full rows, and admit waiting ones where others have ended. Returns the rows
        that continue in the cache, and those to prefill, the shortest first.
        """
        running = [i for i, row in enumerate(self._rows) if row.ended is None]
        going_on = _compacted([i for i in running if self._context.room(self._rows[i].tokens)])
        sliding = [i for i in running if not self._context.room(self._rows[i].tokens)]
        for i in sliding:
            self._rows[i].tokens = self._context.slide(self._rows[i].tokens)
        free = self.batch_size - len(running)
        admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        rows = self._rows + admitted
        arriving = [*sliding, *range(len(self._rows), len(rows))]
        arriving.sort(key=lambda i: len(rows[i].tokens))
        if self._history is not None:  # it has the rows that continue, and then the others
            for row in admitted:
                self._history.add(row.tokens)
            self._history.keep(going_on + arriving)
        return going_on, [rows[i] for i in arriving]

    def _keep(self, order: list[int]) -> None:
        """Row ``i`` becomes what row ``order[i]`` was."""
        if self._cache is not None:
            self._cache.reorder(order)
        self._rows = [self._rows[i] for i in order]

    def _read_last_tokens(self) -> Tensor:
        last = torch.tensor([row.tokens[-1:] for row in self._rows], device=self.model.device)
        return self.model.features(last, cache=self._cache)[:, -1]

    def _room_ahead(self) -> int:
        """How many tokens every running row can get without the host: none of them reaches its
        length, slides, or makes room for another.
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

    def _write_ahead(self, n: int) -> list[Token]:
        """The next ``n`` tokens of each row, or fewer where the row ends."""
        self._keep(_compacted([i for i, row in enumerate(self._rows) if row.ended is None]))
        rows = list(self._rows)
        drawn = bool(self.config.temperature)
        numbers = [[row.draws.random() if drawn else 0.0 for row in rows] for _ in range(n)]
        expected = max(self.config.max_new_tokens - row.written for row in rows)
        assert self._loop is not None, "rows are read before"
        chosen = self._loop.run(
            self.model, [row.tokens[-1] for row in rows], numbers, expected=expected
        )
        if chosen is None:
            raise UsageError(NO_NUMBERS)
        pairs = (pair for tokens in chosen for pair in zip(rows, tokens, strict=True))
        return [self._written(row, token) for row, token in pairs if row.ended is None]

    def _prefill(self, arriving: list[_Row]) -> Tensor:
        """Read whole prompts into the cache, equal ones once: their last features, ``[B, C]``."""
        prompts: list[list[int]] = []
        own = []  # the index of each row's prompt
        for row in arriving:
            if row.tokens not in prompts:
                prompts.append(row.tokens)
            own.append(prompts.index(row.tokens))
        cache = self._prefix.new_cache(prompts)
        start = cache.length
        ends = [len(prompt) - start for prompt in prompts]
        padded = [
            prompt[start:] + [0] * (max(ends) - n) for prompt, n in zip(prompts, ends, strict=True)
        ]
        ids = torch.tensor(padded, device=self.model.device)
        # In a ring, padding would overwrite a row's own tokens.
        valid = ends if self.model.config.window else None
        reading = self._watched(arriving, prompts, start)
        each = None if reading is None else reading.add
        features = read(self.model, ids, cache, valid=valid, each=each)
        if reading is not None:
            for row, number in zip(arriving, own, strict=True):
                if row.wants_details:
                    row.prompt_details = self._prefix.details[:start] + reading.found[number]
        cache.truncate([len(prompt) for prompt in prompts])
        assert self._cache is not None
        self._cache.add(cache, own)
        self._rows += arriving
        return features[own, [ends[i] - 1 for i in own]]

    def _watched(self, rows: list[_Row], prompts: list[list[int]], start: int) -> Reading | None:
        """Collects the details of the prompts whose rows want them, if any does."""
        if self._describer is None or not any(row.wants_details for row in rows):
            return None
        wanted = [row.tokens for row in rows if row.wants_details]
        return Reading(self._describer, [p if p in wanted else [] for p in prompts], start=start)

    def _make_room(self, arriving: list[_Row]) -> None:
        """Replace the cache if the ``arriving`` rows do not fit, by one that also fits the waiting
        ones.
        """
        old, rows = self._cache, len(self._rows) + len(arriving)
        length = self._longest(arriving)
        if old is not None and rows <= old.max_batch_size and length <= old.capacity:
            return
        rows = min(self.batch_size, rows + len(self._waiting))
        length = self._longest([*arriving, *self._waiting])
        if old is not None:
            rows, length = max(rows, old.max_batch_size), max(length, old.capacity)
        check_cache(self.model, rows, length, self.config.cache)
        if self._ahead > 1:
            self._loop = loop_for(
                self.model, self.config, rows=rows, length=length, vocab_size=self.vocab_size
            )
            self._cache = self._loop.cache
        else:
            self._cache = self.model.new_cache(rows, capacity=length, stored_as=self.config.cache)
            self._cache.reorder([])
        if old is not None:
            self._cache.add(old)

    def remember(self) -> None:
        """Keep what the model has read of the first running sequence in the ``prefix``, for a later
        decoder. This decoder cannot go on afterwards.
        """
        if self._cache is None or not self._rows:
            return
        cache = self._cache
        if self._loop is not None:  # its memory belongs to the model's next texts
            cache = self.model.new_cache(
                1, capacity=self._cache.capacity, stored_as=self.config.cache
            )
            cache.reorder([])
            cache.add(self._cache, [0])
        tokens = self._rows[0].tokens
        read = min(cache.lengths[0], len(tokens) - 1)
        self._cache = None
        if cache.can_truncate([read]):
            cache.truncate([read])
            self._prefix.keep(tokens[:read], cache)

    def _leave_cache(self) -> None:
        """When nothing is left to do, leave the cache and its graphs to the model's next texts."""
        if self._loop is not None and not self.busy:
            if self._remembers:
                self.remember()
            keep(self.model, self._loop)
            self._loop = self._cache = None

    def _longest(self, rows: list[_Row]) -> int:
        """How many tokens the longest of ``rows`` can have in the cache."""
        most = max(len(row.tokens) - row.written for row in rows) + self.config.max_new_tokens
        return min(self._context.length, most)

    def _write(self, logits: Tensor) -> list[Token]:
        """Choose the next token of each row. ``logits`` ``[B, V]`` may have more columns than the
        tokenizer has tokens.
        """
        config, rows, every = self.config, self._rows, logits
        logits = logits[:, : self.vocab_size]
        early = [i for i, row in enumerate(rows) if row.written < config.min_new_tokens]
        processed = penalise(logits, config, self._history, early=early, ends=self._context.ends)
        numbers = [row.draws.random() for row in rows] if config.temperature else []
        chosen = choose(processed, config, numbers)
        ids = on_host(marked(chosen, processed))
        if self._history is not None:
            self._history.append(chosen)
        details = describe(every, chosen, config.logprobs, self.vocab_size)
        tokens = zip(rows, ids, details, strict=True)
        return [self._written(*values) for values in tokens]

    def _written(self, row: _Row, token: int, details: Details = (None, ())) -> Token:
        """Append ``token`` to the row."""
        row.tokens.append(token)
        row.written += 1
        row.ended = self._context.ended(row.tokens, row.written)
        about_prompt, row.prompt_details = row.prompt_details, None
        return Token(row.sequence, token, row.ended, *details, None, about_prompt)


def decode(
    model: GPT, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any
) -> Iterator[Token]:
    """Yield the new tokens of ``config.num_samples`` sequences for each prompt, as they are made.

    Sequence ``i`` continues prompt ``i // num_samples``. ``options`` are :class:`Decoder`'s.
    """
    decoder = Decoder(model, config, **options)
    n = config.num_samples
    check_sequences(len(prompts) * n, sum(map(len, prompts)) * n)
    for prompt in prompts:
        for sample in range(config.num_samples):
            decoder.add(prompt, sample=sample)
    while decoder.busy:
        yield from decoder.advance()


def _of_like_lengths(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Groups of ``rows``, which are sorted by length, in which no row needs much padding."""
    group: list[_Row] = []
    for row in rows:
        if group and len(row.tokens) > 16 + 1.25 * len(group[0].tokens):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _compacted(rows: list[int]) -> list[int]:
    """Ascending ``rows`` in the order that moves the fewest: the last ones fill the gaps."""
    n, held = len(rows), set(rows)
    behind = iter(row for row in rows if row >= n)
    return [i if i in held else next(behind) for i in range(n)]
