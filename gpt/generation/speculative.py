"""Speculative decoding: a draft guesses several tokens cheaply, and the model reads them at once.

The output has exactly the model's distribution (Leviathan et al., 2023, arXiv:2211.17192; Chen et
al., 2023, arXiv:2302.01318). A guess ``x`` that was drawn from ``q`` is kept with probability
``min(1, p(x) / q(x))``. The first rejected guess is replaced by a draw from ``max(0, p - q)``,
normalised. At temperature 0, the tokens are those of plain decoding. Guesses come from a smaller
model with the same tokenizer, or from an earlier occurrence of the last tokens in the text.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpt.config import CacheFormat, GenerationConfig, SamplingConfig, UsageError
from gpt.generation.checks import check_number, check_prompt, check_settings
from gpt.generation.context import Context, Ends, newest
from gpt.generation.decode import Token
from gpt.generation.logprobs import Describer, Reading
from gpt.generation.prefill import evaluation_mode, read
from gpt.generation.prefix import common
from gpt.generation.sampling import (
    NO_NUMBERS,
    UNKNOWN,
    Details,
    History,
    describe,
    draw,
    exact_dtype,
    marked,
    new_draws,
    next_token_probabilities,
    on_host,
    penalise,
)
from gpt.model.gpt import GPT

FIRST = 256
"""Tokens that a cache has memory for at first."""


class Draft(Protocol):
    """Guesses tokens."""

    def start(self, prompt: Sequence[int], sample: int) -> None:
        """Begin a new sequence."""

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], Tensor | None]:
        """Up to ``n`` guesses of the tokens after ``tokens``, and the distributions that they were
        drawn from, ``[guesses, V]``; ``None`` if they were not drawn.
        """


class PromptLookup:
    """Guesses without a model: the tokens after an earlier occurrence of the last tokens, for text
    that repeats itself or its prompt (Saxena, 2023, "prompt lookup decoding").
    """

    def __init__(self, longest: int = 3) -> None:
        """``propose`` looks for the last ``longest`` tokens, then for fewer, down to one."""
        self.longest = longest

    def start(self, prompt: Sequence[int], sample: int) -> None:
        """No-op: there is no state."""

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], None]:
        """The tokens after the latest earlier occurrence of the longest match."""
        for length in range(min(self.longest, len(tokens) - 1), 0, -1):
            end = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == end:
                    return tokens[start + length : start + length + n], None
        return [], None


class DraftModel:
    """Guesses with a smaller model."""

    def __init__(
        self,
        model: GPT,
        config: SamplingConfig,
        *,
        vocab_size: int | None = None,
        seed: int | None = None,
        cache: CacheFormat = "float",
    ) -> None:
        self._reader, self._config = _Reader(model, cache), config
        self._vocab_size = vocab_size or model.config.vocab_size
        self._seed = seed
        self._draws = new_draws(seed, [], 0, guesses=True)

    def start(self, prompt: Sequence[int], sample: int) -> None:
        """Begin a new sequence, with random numbers that depend on no other one."""
        self._draws = new_draws(self._seed, prompt, sample, guesses=True)

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], Tensor | None]:
        """Tokens drawn from the smaller model, one after the other."""
        tokens, guesses, distributions = list(tokens), [], []
        for _ in range(n):
            logits = self._reader.logits(tokens, 1)[:, : self._vocab_size]
            processed = penalise(logits, self._config)
            probabilities = next_token_probabilities(processed, self._config)
            guess = draw(probabilities, [self._draws.random()])
            guesses += on_host(marked(guess, processed))
            distributions.append(probabilities)
            tokens.append(guesses[-1])
        return guesses, torch.cat(distributions) if guesses else None


class Speculator:
    """Decodes one sequence at a time with a :class:`Draft`, and counts its accepted guesses."""

    def __init__(
        self,
        model: GPT,
        config: GenerationConfig,
        draft: Draft,
        *,
        num_draft_tokens: int = 5,
        vocab_size: int | None = None,
        end_of_text: Ends = None,
    ) -> None:
        check_number("num_draft_tokens", num_draft_tokens, 1)
        if config.past_context == "sinks":
            raise UsageError(
                "past_context is 'sinks', and speculative decoding reads at most one context: use "
                "'slide' or 'stop'"
            )
        self.model, self.config, self.draft = model, config, draft
        self.num_draft_tokens, self.end_of_text = num_draft_tokens, end_of_text
        self.vocab_size = vocab_size or model.config.vocab_size
        check_settings(model, config, self.vocab_size)
        self.rounds = 0
        """Forward passes of the model."""
        self.guesses = 0
        self.accepted = 0
        self.written = 0
        self._waiting: dict[int, Iterator[Token]] = {}
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether a sequence is waiting or running."""
        return bool(self._waiting)

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Queue a sequence that begins with ``prompt``, and return its number."""
        prompt = check_prompt(self.model, prompt, self.config, self.vocab_size)
        self._waiting[self._count] = self.decode(prompt, sample=sample, sequence=self._count)
        self._count += 1
        return self._count - 1

    def advance(self) -> list[Token]:
        """The next token of the first sequence that has not ended."""
        if not self.busy:
            return []
        token = next(next(iter(self._waiting.values())))
        if token.ended:
            self.end(token.sequence)
        return [token]

    def end(self, sequence: int) -> None:
        """Stop a sequence; it gets no more tokens."""
        self._waiting.pop(sequence, None)

    @torch.inference_mode()
    def decode(
        self, prompt: Sequence[int], *, sample: int = 0, sequence: int = 0
    ) -> Iterator[Token]:
        """Yield the new tokens of ``prompt``. Raises ``UsageError`` for the same prompts as
        :class:`gpt.generation.decode.Decoder`.
        """
        config, context = self.config, Context(self.model, self.config, self.end_of_text)
        prompt = check_prompt(self.model, prompt, config, self.vocab_size)
        draws = _Draws(new_draws(config.seed, prompt, sample))
        self.draft.start(prompt, sample)
        reader = _Reader(self.model, self.config.cache)
        tokens, written = context.fit(prompt), 0
        history = None
        if config.has_penalties:
            history = History(self.vocab_size, self.model.device)
            history.add(tokens)
        reading = None
        if config.logprobs is not None and sample == 0:
            reading = Reading(Describer(self.model, config.logprobs, self.vocab_size), [tokens[:]])
        each = None if reading is None else reading.add
        while True:
            tokens = context.slide(tokens)
            room = min(context.room(tokens), config.max_new_tokens - written) - 1
            guesses, q = self.draft.propose(tokens, min(room, self.num_draft_tokens))
            numbers = draws.next(len(guesses) + 1)
            # Copy to the device before it gets work: the copies would wait for that.
            ids = torch.tensor(guesses, dtype=torch.int64, device=self.model.device)
            others = torch.tensor(
                [*numbers[1:], numbers[-1]],  # a guess's own number decides whether it is kept
                dtype=exact_dtype(self.model.device),
                device=self.model.device,
            )
            every = reader.logits(tokens + guesses, len(guesses) + 1, each)
            each = None  # the tokens after the prompt are not its own
            self.rounds += 1
            self.guesses += len(guesses)
            histories = None if history is None else history.after_each(ids)
            early = range(min(len(guesses) + 1, max(0, config.min_new_tokens - written)))
            logits = penalise(
                every[:, : self.vocab_size],
                config,
                histories,
                early=early,
                ends=context.ends,
            )
            p = next_token_probabilities(logits, config)
            drawn = marked(draw(_instead(p, ids, q), others), logits)
            kept, last = _verified(p, ids, q, drawn, numbers)
            draws.drop(min(kept + 2, len(numbers)))
            details = self._details(every, ids, drawn, kept)
            for i, token in enumerate([*guesses[:kept], last]):
                if token == UNKNOWN:
                    raise UsageError(NO_NUMBERS)
                self.accepted += i < kept
                self.written += 1
                written += 1
                tokens.append(token)
                ended = context.ended(tokens, written)
                first = reading.found[0] if reading is not None and written == 1 else None
                yield Token(sequence, token, ended, *details[i], prompt_details=first)
                if ended:
                    return
            if histories is not None:
                histories.keep([kept])
                histories.append(drawn[kept : kept + 1])
                history = histories

    def _details(self, logits: Tensor, guesses: Tensor, drawn: Tensor, kept: int) -> list[Details]:
        """The details of the guesses that are kept, and of the token after them."""
        if self.config.logprobs is None:
            return [(None, ())] * (kept + 1)
        tokens = torch.cat([guesses[:kept], drawn[kept : kept + 1].clamp_min(0)])
        return describe(logits[: kept + 1], tokens, self.config.logprobs, self.vocab_size)


class _Draws:
    """Random numbers that can be looked at before they are used up."""

    def __init__(self, draws: np.random.Generator) -> None:
        self._draws = draws
        self._numbers: list[float] = []

    def next(self, n: int) -> list[float]:
        """The next ``n`` numbers."""
        self._numbers += [self._draws.random() for _ in range(n - len(self._numbers))]
        return self._numbers[:n]

    def drop(self, n: int) -> None:
        """Use up the next ``n`` numbers."""
        del self._numbers[:n]


def _instead(p: Tensor, guesses: Tensor, q: Tensor | None) -> Tensor:
    """The weights ``[n + 1, V]`` of the draw that replaces each rejected guess: ``max(0, p - q)``,
    and ``p`` after the last guess. Without ``q`` ``[n, V]``, each guess has ``q = 1``.
    """
    n = len(guesses)
    more = p[:n].scatter(1, guesses[:, None], 0.0) if q is None else (p[:n] - q).clamp_min(0)
    rest = torch.cat([more, p[n:]])
    return rest.where(rest.any(dim=-1, keepdim=True), p)  # p and q may differ only by rounding


def _verified(
    p: Tensor, guesses: Tensor, q: Tensor | None, drawn: Tensor, numbers: Sequence[float]
) -> tuple[int, int]:
    """How many of the ``n`` guesses are kept, and the token after them, from ``drawn`` ``[n + 1]``.
    The host waits for the device once. Each guess was drawn from its row of ``q`` (with probability
    1 without ``q``), and its random number decides whether it is kept.
    """
    n = len(guesses)
    mine = p[:n].gather(1, guesses[:, None])[:, 0]
    theirs = torch.ones_like(mine) if q is None else q.gather(1, guesses[:, None])[:, 0]
    exact = exact_dtype(p.device)
    told = torch.cat([mine.to(exact), theirs.to(exact), drawn.to(exact)]).tolist()
    kept = 0
    while (
        kept < n and told[2 * n + kept] != UNKNOWN and numbers[kept] * told[n + kept] < told[kept]
    ):
        kept += 1
    return kept, int(told[2 * n + kept])


class _Reader:
    """A model that reads a growing text, each time only the new tokens. Its cache grows too."""

    def __init__(self, model: GPT, cache: CacheFormat) -> None:
        self.model = model
        capacity = min(FIRST, model.config.context_length)
        self._cache = model.new_cache(capacity=capacity, stored_as=cache)
        self._tokens: list[int] = []

    def logits(
        self, tokens: list[int], n: int, each: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """The logits after each of the last ``n`` tokens, ``[n, V]``. Reads only the
        :func:`newest` ones of a text that is longer than the context; ``each`` is :func:`read`'s.
        """
        tokens = newest(tokens, self.model.config.context_length)
        kept = min(len(common(self._tokens, tokens)), len(tokens) - n)
        kept = kept if self._cache.can_truncate([kept]) else 0
        self._cache.truncate(kept)
        if len(tokens) > self._cache.capacity:  # twice as much, so that few tokens are copied
            capacity = min(2 * len(tokens), self.model.config.context_length)
            self._cache = self._cache.expand(1, capacity=capacity)
        self._tokens = list(tokens)
        unread = torch.tensor([tokens[kept:]], device=self.model.device)
        with evaluation_mode(self.model):
            features = read(self.model, unread, self._cache, each=each)[0, -n:]
        logits: Tensor = self.model.logits(features)
        return logits
