"""Prefill and decode over a cache: token ids to more token ids, for many sequences at once.

The model reads each prompt once, and then each new token once. Sequences of any lengths go through
together. Each row of the batch has its own positions, and its context holds only its own tokens.
When a sequence ends, the next waiting one takes its row. Equal prompts are read once, and so is
the beginning that the prompts of a batch share. Each sequence may have settings of its own.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from gpt.generation.prefix import Beginnings, Prefix
from gpt.generation.row import Row, next_tokens
from gpt.generation.sampling import NO_NUMBERS, Details, History, new_draws
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
        prefix: Beginnings | None = None,
        reserve: int | None = None,
    ) -> None:
        """``vocab_size`` is the tokenizer's; the model may have more rows than that. Sequences end
        at ``end_of_text``, one id or any of several. The device chooses up to ``ahead`` tokens of a
        sequence before the host looks at them (:mod:`gpt.generation.ahead`): by default 1, on a GPU
        several. ``prefix`` is what another decoder of the model read and
        :meth:`remember` kept. The cache has room for all tokens that the rows may get; with
        ``reserve``, for this many more than they have, and it grows with them.
        """
        self.model, self.config, self.batch_size = model, config, batch_size
        self.reserve = reserve
        self.vocab_size = vocab_size or model.config.vocab_size
        check_number("batch_size", batch_size, 1)
        check_settings(model, config, self.vocab_size)
        self._ends = end_of_text
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []  # as in the cache
        self._cache: KVCache | None = None
        self._history: History | None = None  # while a row has penalties
        on_gpu = model.device.type == "cuda"
        self._ahead = min(MOST, ahead or (MOST if on_gpu else 1))
        if config.has_penalties or config.logprobs is not None:
            self._ahead = 1  # the loop computes neither
        self._loop: TokenLoop | None = None
        describer = None
        if config.logprobs is not None:
            describer = Describer(model, config.logprobs, self.vocab_size)
            prefix = None  # what was read without details has none
        self._prefix: Beginnings = prefix or Prefix(model, describer, cache=config.cache)
        self._remembers = prefix is not None
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether a sequence is waiting or running."""
        return bool(self._waiting) or any(row.ended is None for row in self._rows)

    def add(
        self,
        prompt: Sequence[int],
        *,
        sample: int = 0,
        config: GenerationConfig | None = None,
        end_of_text: Ends = None,
        describes: bool | None = None,
    ) -> int:
        """Queue a sequence that begins with ``prompt``, and return its number.

        With one seed, the sequences of a prompt differ by their ``sample``. ``config`` and
        ``end_of_text`` are the sequence's own, in place of the decoder's. With log-probabilities,
        ``describes`` is whether the prompt's tokens get them too: by default those of sample 0.
        Raises ``UsageError`` for an empty prompt, and for an id outside of the vocabulary. If the
        prompt is longer than the context, ``slide`` reads its last ``context_length`` tokens, and
        ``stop`` raises.
        """
        if config is not None:
            check_settings(self.model, config, self.vocab_size)
            self._ahead = 1  # the loop has one choice for all rows
        config = config or self.config
        prompt = check_prompt(self.model, prompt, config, self.vocab_size)
        context = Context(self.model, config, self._ends if end_of_text is None else end_of_text)
        draws = new_draws(config.seed, prompt, sample)
        describes = config.logprobs is not None and (not sample if describes is None else describes)
        row = Row(self._count, config, context, context.fit(prompt), draws, describes)
        self._waiting.append(row)
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
        if any(len(row.tokens) > self._capacity for row in self._rows):  # with ``reserve``
            self._make_room([])
        features = [self._read_last_tokens()] if self._rows else []
        if arriving:
            self._make_room(arriving)
            upcoming = [row.tokens for row in itertools.islice(self._waiting, 1)]
            self._prefix.read_common([row.tokens for row in arriving], upcoming)
        return features + [self._prefill(rows) for rows in self._read_together(arriving)]

    def _next_rows(self) -> tuple[list[int], list[Row]]:
        """Slide the full rows, and admit waiting ones where others have ended. Returns the rows
        that continue in the cache, and those to prefill, the shortest first.
        """
        running = [i for i, row in enumerate(self._rows) if row.ended is None]
        going_on = _compacted([i for i in running if self._room(self._rows[i])])
        sliding = [i for i in running if not self._room(self._rows[i])]
        for i in sliding:
            self._rows[i].tokens = self._rows[i].context.slide(self._rows[i].tokens)
        free = self.batch_size - len(running)
        admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        rows = self._rows + admitted
        arriving = [*sliding, *range(len(self._rows), len(rows))]
        arriving.sort(key=lambda i: (self._origin(rows[i]), len(rows[i].tokens)))
        self._remember_written(admitted, going_on + arriving)
        return going_on, [rows[i] for i in arriving]

    def _remember_written(self, admitted: list[Row], order: list[int]) -> None:
        """Add ``admitted`` rows to the history, in which row ``i`` becomes what row ``order[i]``
        was. It exists while a row needs it.
        """
        rows = self._rows + admitted
        if not any(rows[i].config.has_penalties for i in order):
            self._history = None
            return
        if self._history is None:
            self._history = History(self.vocab_size, self.model.device)
            for _ in self._rows:  # they need none
                self._history.add([])
        for row in admitted:
            self._history.add(row.tokens)
        self._history.keep(order)

    @staticmethod
    def _room(row: Row) -> int:
        """How many tokens the model can predict before the row's context is full."""
        return row.context.room(row.tokens)

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
        if any(row.written < row.config.min_new_tokens for row in running):
            return 0
        room = (min(row.left, self._room(row)) for row in running)
        return min(self._ahead, *room)

    def _write_ahead(self, n: int) -> list[Token]:
        """The next ``n`` tokens of each row, or fewer where the row ends."""
        self._keep(_compacted([i for i, row in enumerate(self._rows) if row.ended is None]))
        rows = list(self._rows)
        drawn = bool(self.config.temperature)
        numbers = [[row.draws.random() if drawn else 0.0 for row in rows] for _ in range(n)]
        expected = max(row.left for row in rows)
        assert self._loop is not None, "rows are read before"
        chosen = self._loop.run(
            self.model, [row.tokens[-1] for row in rows], numbers, expected=expected
        )
        if chosen is None:
            raise UsageError(NO_NUMBERS)
        pairs = (pair for tokens in chosen for pair in zip(rows, tokens, strict=True))
        return [self._written(row, token) for row, token in pairs if row.ended is None]

    def _prefill(self, arriving: list[Row]) -> Tensor:
        """Read whole prompts into the cache, equal ones once: their last features, ``[B, C]``."""
        prompts: list[list[int]] = []
        own = []  # the index of each row's prompt
        for row in arriving:
            if row.tokens not in prompts:
                prompts.append(row.tokens)
            own.append(prompts.index(row.tokens))
        takes_all = self._takes_all(len(prompts), len(arriving))
        capacity = self._capacity if takes_all else max(map(len, prompts))
        if takes_all:  # the prompts' cache takes its place, so that there are not two
            self._cache = None
        watched = any(row.wants_details for row in arriving)
        if watched and self._prefix.describer is None:  # nobody kept the details of its tokens
            cache = self.model.new_cache(
                len(prompts), capacity=capacity, stored_as=self.config.cache
            )
        else:
            cache = self._prefix.new_cache(prompts, capacity=capacity)
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
                    details = self._prefix.details[:start] + reading.found[number]
                    row.prompt_details = [token.of_top(row.config.logprobs) for token in details]
        cache.truncate([len(prompt) for prompt in prompts])
        if self._cache is None:
            self._cache = cache
        else:
            self._cache.add(cache, own)
        self._rows += arriving
        return features[own, [ends[i] - 1 for i in own]]

    def _takes_all(self, prompts: int, arriving: int) -> bool:
        """Whether the ``arriving`` rows, of so many ``prompts``, fill the whole cache."""
        if self._cache is None or self._loop is not None or self._rows:
            return False
        return prompts == arriving == self._cache.max_batch_size

    def _watched(self, rows: list[Row], prompts: list[list[int]], start: int) -> Reading | None:
        """Collects the details of the prompts whose rows want them, if any does."""
        wanting = [row for row in rows if row.wants_details]
        if not wanting:
            return None
        top = max(row.config.logprobs or 0 for row in wanting)
        wanted = [row.tokens for row in wanting]
        describer = Describer(self.model, top, self.vocab_size)
        return Reading(describer, [p if p in wanted else [] for p in prompts], start=start)

    @property
    def _capacity(self) -> int:
        return 0 if self._cache is None else self._cache.capacity

    def _make_room(self, arriving: list[Row]) -> None:
        """Replace the cache if the ``arriving`` rows do not fit, by one that also fits the waiting
        ones.
        """
        old, rows = self._cache, len(self._rows) + len(arriving)
        length = self._longest([*self._rows, *arriving])
        if old is not None and rows <= old.max_batch_size and length <= old.capacity:
            return
        rows = min(self.batch_size, rows + len(self._waiting))
        length = self._longest([*self._rows, *arriving, *self._waiting])
        if self.reserve is not None:  # so that few arrivals copy the cache
            rows = min(self.batch_size, 1 << (rows - 1).bit_length())
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

    def copy_of(self, sequence: int) -> tuple[list[int], KVCache] | None:
        """What the model has read of a sequence that got a token from the last :meth:`advance`: its
        tokens, and a cache of one row with room for no more. ``None`` if it is not there, or if an
        attention window has lost what is before its last token.
        """
        for i, row in enumerate(self._rows):
            if row.sequence == sequence and self._cache is not None:
                read = min(self._cache.lengths[i], len(row.tokens) - 1)
                length, stored_as = self._cache.lengths[i], self.config.cache
                cache = self.model.new_cache(1, capacity=length, stored_as=stored_as)
                cache.reorder([])
                cache.add(self._cache, [i])
                if not cache.can_truncate([read]):
                    return None
                cache.truncate([read])
                return row.tokens[:read], cache
        return None

    def release(self) -> None:
        """Give back the cache's memory, if no sequence is running."""
        if not self.busy:
            self._rows, self._cache, self._history = [], None, None

    @property
    def cache_bytes(self) -> int:
        """Memory of the running sequences' keys and values."""
        cache = self._cache  # another thread may read it meanwhile
        return 0 if cache is None else cache.nbytes

    def _longest(self, rows: list[Row]) -> int:
        """How many tokens the longest of ``rows`` can have in the cache, before it grows."""
        return max(min(row.context.length, len(row.tokens) + self._reserved(row)) for row in rows)

    def _reserved(self, row: Row) -> int:
        if self.reserve is None:
            return row.left
        return min(row.left, max(self.reserve, len(row.tokens) // 2))

    def _origin(self, row: Row) -> int:
        """The prefix that the row begins with; rows of one are read together."""
        if row.wants_details and self._prefix.describer is None:
            return -1
        return self._prefix.origin(row.tokens)

    def _read_together(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Groups of ``rows``, which are sorted by origin and length: one origin each, and no row
        needs much padding.
        """
        group: list[Row] = []
        origins = [self._origin(row) for row in rows]
        for row, origin, last in zip(rows, origins, [None, *origins], strict=False):
            if group and (origin != last or len(row.tokens) > 16 + 1.25 * len(group[0].tokens)):
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _write(self, logits: Tensor) -> list[Token]:
        """Choose the next token of each row. ``logits`` ``[B, V]`` may have more columns than the
        tokenizer has tokens.
        """
        chosen, found = next_tokens(self._rows, logits, self._history, self.vocab_size)
        if self._history is not None:
            self._history.append(chosen)
        return [self._written(row, *own) for row, own in zip(self._rows, found, strict=True)]

    def _written(self, row: Row, token: int, details: Details = (None, ())) -> Token:
        """Append ``token`` to the row."""
        row.tokens.append(token)
        row.written += 1
        row.ended = row.context.ended(row.tokens, row.written)
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


def _compacted(rows: list[int]) -> list[int]:
    """Ascending ``rows`` in the order that moves the fewest: the last ones fill the gaps."""
    n, held = len(rows), set(rows)
    behind = iter(row for row in rows if row >= n)
    return [i if i in held else next(behind) for i in range(n)]
