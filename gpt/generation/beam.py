"""Beam search: the continuations with the highest summed log-probability that the search finds.

The search reorders the cache to follow the beams, so that the model reads each token once. It has
the candidates, scores and end of Hugging Face's ``generate``.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.config import GenerationConfig, UsageError
from gpt.device import check_memory
from gpt.generation.checks import check_cache, check_prompt, check_settings
from gpt.generation.context import Context, Ends
from gpt.generation.decode import Token
from gpt.generation.logprobs import Describer, Reading
from gpt.generation.prefill import evaluation_mode, read
from gpt.generation.sampling import Details, History, describe, finite, penalise
from gpt.model.gpt import GPT

CANDIDATE_BYTES = 500
"""Host memory of one candidate, without its tokens."""


@dataclass(frozen=True)
class Beam:
    """One continuation, with the token that ends its text if it has one."""

    tokens: list[int]
    score: float
    """Summed log-probability in nats over ``len(tokens) ** length_penalty``."""
    details: list[Details]
    """The details of each token, from :func:`gpt.generation.sampling.describe`."""


@torch.inference_mode()
def beam_search(
    model: GPT,
    prompt: list[int],
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    end_of_text: Ends = None,
    reading: Reading | None = None,
) -> list[Beam]:
    """The best ``config.num_samples`` of ``config.num_beams`` continuations, the best first.

    Bias and penalties apply to the log-probabilities. Temperature and filters do not apply. A
    continuation ends at ``end_of_text``, after ``max_new_tokens``, or when the context is full.
    ``reading`` collects the details of the prompt.
    """
    vocab_size = vocab_size or model.config.vocab_size
    context, width = _context(model, config, end_of_text), config.num_beams
    prompt = check(model, prompt, config, vocab_size)
    limit = min(config.max_new_tokens, context.room(prompt))
    device = model.device
    capacity = min(context.length, len(prompt) + limit)
    cache = model.new_cache(width, capacity=capacity, stored_as=config.cache)
    cache.reorder([0])
    history = None
    if config.has_penalties:
        history = History(vocab_size, device)
        history.add(prompt)
    unread = torch.tensor([prompt], device=device)
    beams = [Beam([], 0.0, [])]
    scores = torch.zeros(1, device=device)
    finished: list[Beam] = []
    each = None if reading is None else reading.add
    for length in range(1, limit + 1):
        with evaluation_mode(model):
            every = model.logits(read(model, unread, cache, each=each)[:, -1:])[:, -1]
        each = None  # the tokens after the prompt are not its own
        logits = every[:, :vocab_size]
        early = range(len(beams)) if length <= config.min_new_tokens else ()
        logprobs = logits.float().log_softmax(dim=-1)
        logprobs = penalise(logprobs, config, history, early=early, ends=context.ends)
        finite(logprobs)
        most = width * max(2, 1 + len(context.ends))  # enough that go on, as in Hugging Face's
        best = _best(scores[:, None] + logprobs, most)
        details = _details(every, best, config.logprobs, vocab_size)
        candidates = []
        for (score, parent, token), detail in zip(best, details, strict=True):
            before = beams[parent]
            beam = Beam([*before.tokens, token], score, [*before.details, detail])
            candidates.append((parent, beam))
        for _, beam in candidates[:width]:
            if beam.tokens[-1] in context.ends or length == limit:
                score = beam.score / length**config.length_penalty
                finished.append(dataclasses.replace(beam, score=score))
        finished = sorted(finished, key=lambda beam: -beam.score)[:width]
        going_on = [c for c in candidates if c[1].tokens[-1] not in context.ends][:width]
        if length == limit or not going_on:
            break
        if _is_over(finished, going_on[0][1].score, length, limit, config):
            break
        parents, beams = [parent for parent, _ in going_on], [beam for _, beam in going_on]
        scores = torch.tensor([beam.score for beam in beams], device=device)
        cache.reorder(parents)
        unread = torch.tensor([beam.tokens[-1:] for beam in beams], device=device)
        if history is not None:
            history.keep(parents)
            history.append(unread[:, 0])
    return finished[: config.num_samples]


def _best(scores: Tensor, n: int) -> list[tuple[float, int, int]]:
    """The ``n`` highest of ``scores`` ``[B, V]``, each with its row and its token."""
    best = scores.flatten().topk(min(n, scores.numel()))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(x, *divmod(i, scores.shape[1])) for x, i in pairs if x > -math.inf]


def _details(
    logits: Tensor, best: list[tuple[float, int, int]], top: int | None, vocab_size: int
) -> list[Details]:
    """The details of all candidates in ``best``; their parents' ``logits`` are ``[B, V]``."""
    if top is None:
        return [(None, ())] * len(best)
    rows = torch.tensor([[parent, token] for _, parent, token in best], device=logits.device)
    return describe(logits[rows[:, 0]], rows[:, 1], top, vocab_size)


def check(
    model: GPT, prompt: Sequence[int], config: GenerationConfig, vocab_size: int
) -> list[int]:
    """The prompt's ids; ``UsageError`` if the search is impossible or needs too much memory."""
    context = _context(model, config)
    if len(prompt) > context.length:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, and the model's context_length is "
            f"{context.length:,}; shorten the prompt, since a beam search cannot slide"
        )
    prompt = check_prompt(model, prompt, config, vocab_size)
    check_settings(model, config, vocab_size)
    width, limit = config.num_beams, min(config.max_new_tokens, context.room(prompt))
    check_memory(
        f"{width:,} beams of up to {limit:,} tokens",
        4 * width * (CANDIDATE_BYTES + 16 * limit),  # two candidates a beam, and finished beams
        torch.device("cpu"),
        advice="use a smaller num_beams or max_new_tokens",
    )
    check_cache(model, width, min(context.length, len(prompt) + limit), config.cache)
    return prompt


def _context(model: GPT, config: GenerationConfig, end_of_text: Ends = None) -> Context:
    """A beam's context, which never slides."""
    return Context(model, dataclasses.replace(config, past_context="stop"), end_of_text)


def _is_over(
    finished: list[Beam], best: float, length: int, limit: int, config: GenerationConfig
) -> bool:
    """Whether no beam that continues is expected to become one of the best."""
    if len(finished) < config.num_beams:
        return False
    if config.early_stopping == "first":
        return True
    longest = config.early_stopping == "never" and config.length_penalty > 0
    reachable: float = best / (limit if longest else length) ** config.length_penalty
    return reachable <= finished[-1].score


class BeamSearch:
    """Searches for one prompt after the other, with the methods of
    :class:`gpt.generation.decode.Decoder`.
    """

    def __init__(
        self,
        model: GPT,
        config: GenerationConfig,
        *,
        vocab_size: int | None = None,
        end_of_text: Ends = None,
    ) -> None:
        self.model, self.config = model, config
        self.vocab_size = vocab_size or model.config.vocab_size
        self.end_of_text = end_of_text
        self._waiting: list[list[int]] = []
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether a prompt is waiting."""
        return bool(self._waiting)

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Queue a sequence, and return its number. Sample ``n`` of a prompt is the ``n``-th best
        result of its search, and all samples of a prompt are added one after the other.
        """
        if sample == 0:
            prompt = check(self.model, prompt, self.config, self.vocab_size)
            self._waiting.append(prompt)
        self._count += 1
        return self._count - 1

    def advance(self) -> list[Token]:
        """All tokens of all sequences of the next prompt, one sequence after the other."""
        if not self.busy:
            return []
        first = self._count - len(self._waiting) * self.config.num_samples
        prompt = self._waiting.pop(0)
        context, top = _context(self.model, self.config, self.end_of_text), self.config.logprobs
        reading = None
        if top is not None:
            reading = Reading(Describer(self.model, top, self.vocab_size), [prompt])
        beams = beam_search(
            self.model,
            prompt,
            self.config,
            vocab_size=self.vocab_size,
            end_of_text=self.end_of_text,
            reading=reading,
        )
        if len(beams) < self.config.num_samples:
            raise UsageError(
                f"num_samples is {self.config.num_samples}, and the search found only "
                f"{len(beams)} continuations"
            )
        tokens = []
        for sequence, beam in enumerate(beams, first):
            *before, last = beam.tokens
            for token, details in zip(before, beam.details, strict=False):
                tokens.append(Token(sequence, token, None, *details))
            ended = context.ended(prompt + beam.tokens, len(beam.tokens))
            tokens.append(Token(sequence, last, ended, *beam.details[-1], score=beam.score))
        if reading is not None:
            tokens[0] = dataclasses.replace(tokens[0], prompt_details=reading.found[0])
        return tokens

    def end(self, sequence: int) -> None:
        """No-op: :meth:`advance` returns whole sequences."""
