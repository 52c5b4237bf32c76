"""Speculative decoding: several tokens are guessed cheaply, and read by the model at once.

What comes out has exactly the model's distribution (Leviathan et al., 2023, arXiv:2211.17192; Chen
et al., 2023, arXiv:2302.01318): a guess ``x`` that was drawn from ``q`` is kept with probability
``min(1, p(x) / q(x))``, and the first one that is not is replaced by a draw from what ``p`` has
more than ``q``. At temperature 0 these are the tokens of plain decoding. Guesses come from a
smaller model with the same tokenizer, or from what followed the same tokens earlier in the text.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpt.config import GenerationConfig, SamplingConfig, UsageError
from gpt.generation.checks import check_prompt, check_settings
from gpt.generation.decode import Reason, Token, common, evaluation_mode
from gpt.generation.sampling import (
    History,
    describe,
    draw,
    finite,
    new_draws,
    next_token_probabilities,
    penalise,
)
from gpt.model.gpt import GPT


class Draft(Protocol):
    """Whatever guesses."""

    def start(self, prompt: Sequence[int], sample: int) -> None:
        """A new sequence begins."""

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], Tensor | None]:
        """Up to ``n`` guesses of what follows ``tokens``, and the distributions that they were
        drawn from, ``[guesses, V]``; ``None`` if they were certain.
        """


class PromptLookup:
    """Guesses what followed the last tokens where they stood before, without a model: text that
    repeats itself, or its prompt (Saxena, 2023, "prompt lookup decoding").
    """

    def __init__(self, longest: int = 3) -> None:
        """Looks for the last ``longest`` tokens, then for fewer, down to one."""
        self.longest = longest

    def start(self, prompt: Sequence[int], sample: int) -> None:
        """Nothing to forget."""

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], None]:
        """What followed the latest earlier occurrence."""
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
    ) -> None:
        self._reader, self._config = _Reader(model), config
        self._vocab_size = vocab_size or model.config.vocab_size
        self._seed = seed
        self._draws = new_draws(seed, [], 0, guesses=True)

    def start(self, prompt: Sequence[int], sample: int) -> None:
        """The guesses of a sequence depend on no other one."""
        self._draws = new_draws(self._seed, prompt, sample, guesses=True)

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], Tensor | None]:
        """Tokens drawn from the smaller model, one after the other."""
        tokens, guesses, distributions = list(tokens), [], []
        for _ in range(n):
            logits = self._reader.logits(tokens, 1)[:, : self._vocab_size]
            processed = finite(penalise(logits, self._config))
            probabilities = next_token_probabilities(processed, self._config)
            guesses.append(int(draw(probabilities, [self._draws.random()])))
            distributions.append(probabilities)
            tokens.append(guesses[-1])
        return guesses, torch.cat(distributions) if guesses else None


class Speculator:
    """Decodes one sequence at a time with a :class:`Draft`, and counts what its guesses were
    worth.
    """

    def __init__(
        self,
        model: GPT,
        config: GenerationConfig,
        draft: Draft,
        *,
        num_draft_tokens: int = 5,
        vocab_size: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        if num_draft_tokens < 1:
            raise UsageError(f"num_draft_tokens is {num_draft_tokens}, and must be at least 1")
        self.model, self.config, self.draft = model, config, draft
        self.num_draft_tokens, self.end_of_text = num_draft_tokens, end_of_text
        self.vocab_size = vocab_size or model.config.vocab_size
        check_settings(model, config, self.vocab_size)
        self.rounds = 0
        """Times that the model read something."""
        self.guesses = 0
        self.accepted = 0
        self.written = 0
        self._waiting: dict[int, Iterator[Token]] = {}
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting)

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Queue a sequence that begins with ``prompt``, and return its number."""
        check_prompt(self.model, prompt, self.config, self.vocab_size)
        self._waiting[self._count] = self.decode(prompt, sample=sample, sequence=self._count)
        self._count += 1
        return self._count - 1

    def step(self) -> list[Token]:
        """The next token of the first sequence that has not ended."""
        token = next(next(iter(self._waiting.values())))
        if token.ended:
            self.end(token.sequence)
        return [token]

    def end(self, sequence: int) -> None:
        """Write no more of a sequence."""
        self._waiting.pop(sequence, None)

    @torch.inference_mode()
    def decode(
        self, prompt: Sequence[int], *, sample: int = 0, sequence: int = 0
    ) -> Iterator[Token]:
        """The new tokens of ``prompt``; refuses what :class:`gpt.generation.decode.Decoder`
        refuses.
        """
        config, context = self.config, self.model.config.context_length
        check_prompt(self.model, prompt, config, self.vocab_size)
        draws = new_draws(config.seed, prompt, sample)
        self.draft.start(prompt, sample)
        reader, tokens, written = _Reader(self.model), list(prompt)[-context:], 0
        history = None
        if config.has_penalties:
            history = History(self.vocab_size, self.model.device)
            history.add(tokens)
        while True:
            if len(tokens) > context:
                tokens = tokens[-max(1, context // 2) :]
            room = min(context - len(tokens), config.max_new_tokens - written - 1)
            guesses, distributions = self.draft.propose(tokens, min(room, self.num_draft_tokens))
            every = reader.logits(tokens + guesses, len(guesses) + 1)
            logits = every[:, : self.vocab_size]
            self.rounds += 1
            self.guesses += len(guesses)
            for i in range(len(guesses) + 1):
                early = (0,) if written < config.min_new_tokens else ()
                processed = penalise(
                    logits[i : i + 1], config, history, early=early, end_of_text=self.end_of_text
                )
                p = next_token_probabilities(finite(processed), config)
                q = None if distributions is None else distributions[i : i + 1]
                guess = guesses[i] if i < len(guesses) else None
                token, accepted = _verified(p, guess, q if guess is not None else None, draws)
                self.accepted += accepted
                self.written += 1
                written += 1
                tokens.append(token)
                chosen = torch.tensor([token], device=logits.device)
                if history is not None:
                    history.append(chosen)
                ended = self._end(token, written, len(tokens))
                [details] = describe(every[i : i + 1], chosen, config.logprobs, self.vocab_size)
                yield Token(sequence, token, ended, *details)
                if ended:
                    return
                if not accepted:
                    break

    def _end(self, token: int, written: int, length: int) -> Reason | None:
        if token == self.end_of_text:
            return "end_of_text"
        if written == self.config.max_new_tokens:
            return "length"
        full = length > self.model.config.context_length
        return "context" if full and self.config.past_context == "stop" else None


def _verified(
    p: Tensor, guess: int | None, q: Tensor | None, draws: np.random.Generator
) -> tuple[int, bool]:
    """The next token, drawn from ``p`` ``[1, V]``, and whether it is the guess (drawn from ``q``;
    certain without one).
    """
    if guess is None:
        return int(draw(p, [draws.random()])), False
    guessed = 1.0 if q is None else q[0, guess].item()
    if draws.random() * guessed < p[0, guess].item():
        return guess, True
    if q is None:
        rest = p.clone()
        rest[0, guess] = 0
    else:
        rest = (p - q).clamp_min(0)
    if not rest.any():  # p and q are one, but for rounding
        rest = p
    return int(draw(rest, [draws.random()])), False


class _Reader:
    """A model that reads a text again and again, and each time only what is new of it."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._cache = model.new_cache()
        self._tokens: list[int] = []

    def logits(self, tokens: list[int], n: int) -> Tensor:
        """Logits of what follows each of the last ``n`` tokens, ``[n, V]``.

        Of a text that is longer than the context, the newer half of the context is read, and then
        up to another half.
        """
        context = self.model.config.context_length
        if len(tokens) > context:
            half = max(1, context // 2)
            tokens = tokens[(len(tokens) - context + half - 1) // half * half :]
        kept = min(len(common(self._tokens, tokens)), len(tokens) - n)
        self._cache.truncate(kept)
        self._tokens = list(tokens)
        unread = torch.tensor([tokens[kept:]], device=self.model.device)
        with evaluation_mode(self.model):
            features = self.model.features(unread, cache=self._cache)[0, -n:]
        logits: Tensor = self.model.head(features)
        return logits
