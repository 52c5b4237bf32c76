"""Prompts to text: streamed in whole characters, up to a stop text or the end of the document."""

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from gpt.config import GenerationConfig, UsageError, nearest, quoted, token_ids
from gpt.data.tokenizer import Tokenizer, ends_of, fingerprint, opening_space, prompt_ids
from gpt.generation.beam import BeamSearch
from gpt.generation.checks import check_number, check_sequences
from gpt.generation.context import Reason
from gpt.generation.continuer import Continuer
from gpt.generation.decode import Decoder, Token
from gpt.generation.logprobs import TokenDetails
from gpt.generation.prefix import Prefix
from gpt.generation.speculative import Draft, DraftModel, PromptLookup, Speculator
from gpt.model.gpt import GPT

Prompt = str | Sequence[int]
"""A text, or a sequence of token ids."""


@dataclass
class Completion:
    """One continuation of one prompt."""

    prompt: int
    """The index of the prompt that it continues."""
    sample: int
    """The index among the prompt's ``num_samples``."""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """The new tokens, including those of a stop text."""
    reason: Reason | None = None
    """Why it ended: end of the document, ``max_new_tokens``, a full context, or a stop text."""
    logprobs: list[float] = field(default_factory=list)
    """The model's log-probability of each of ``tokens``, in nats, if ``logprobs`` is set."""
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The likeliest ids at each of ``tokens``, with their log-probabilities."""
    score: float | None = None
    """A beam's log-probability, divided by its length to the power of the length penalty."""
    prompt_details: list[TokenDetails] | None = None
    """The same for the prompt's tokens from the second on, if ``logprobs`` is set; of a prompt that
    is longer than the context, for the tokens that the model reads."""


def generate(
    model: tuple[GPT, Tokenizer],
    prompts: str | Sequence[Prompt] = "",
    *,
    batch_size: int = 32,
    draft: tuple[GPT, Tokenizer] | None = None,
    num_draft_tokens: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> list[Completion]:
    """Continue ``prompts``, texts or lists of token ids, and return ``num_samples`` completions of
    each, in order.

    ``model`` comes from :func:`gpt.load`, and ``settings`` are the fields of
    :class:`gpt.config.GenerationConfig`: ``temperature``, ``top_p``, ``max_new_tokens``, ``stop``,
    ``seed`` and so on. An empty prompt is the start of a document. Up to ``batch_size`` sequences
    go through the model together, which changes them only by rounding (:class:`Decoder`). With
    ``num_draft_tokens``, decoding is speculative (:func:`new_decoder`), one sequence at a time.
    ``cancelled`` is called after each piece of text. When it returns True, the completions are
    returned as they are, and unfinished ones have no ``reason``. Raises ``UsageError`` for invalid
    settings and prompts.
    """
    options = ("batch_size", "draft", "num_draft_tokens", "cancelled")
    texts, config = _listed(prompts), settings_of(settings, options)
    decoder = new_decoder(
        model, config, batch_size=batch_size, draft=draft, num_draft_tokens=num_draft_tokens
    )
    completions = {}
    for _, completion in run(model, texts, decoder):
        completions[completion.prompt, completion.sample] = completion
        if cancelled():
            break
    return [completions[key] for key in sorted(completions)]


def stream(
    model: tuple[GPT, Tokenizer],
    prompt: Prompt = "",
    *,
    draft: tuple[GPT, Tokenizer] | None = None,
    num_draft_tokens: int = 0,
    **settings: Any,
) -> Iterator[str]:
    """Yield one continuation of ``prompt`` in pieces, as they are made. Joined, they are the text
    of :func:`generate`. To stop early, leave the loop.
    """
    config = settings_of(settings, ("draft", "num_draft_tokens"))
    if config.num_samples != 1:
        raise UsageError(f"num_samples is {config.num_samples}, and must be 1 for a stream")
    decoder = new_decoder(model, config, draft=draft, num_draft_tokens=num_draft_tokens)
    return (piece for piece, _ in run(model, [prompt], decoder) if piece)


def run(
    model: tuple[GPT, Tokenizer],
    prompts: Sequence[Prompt],
    decoder: Continuer,
    *,
    begins: bool | None = None,
) -> Iterator[tuple[str, Completion]]:
    """Yield each piece of text as it becomes certain, with its completion.

    A completion's last piece, which may be empty, comes when its ``reason`` is set. ``decoder`` is
    a new one from :func:`new_decoder`. ``begins`` is whether a continuation is a text of its own;
    by default, whether its prompt has no text.
    """
    (_, tokenizer), config = model, decoder.config
    writings: list[Writing] = []
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    n = config.num_samples
    check_sequences(len(encoded) * n, sum(map(len, encoded)) * n)
    for number, ids in enumerate(encoded):
        for sample in range(config.num_samples):
            decoder.add(ids, sample=sample)
            own = begins_text(tokenizer, ids) if begins is None else begins
            text = GrowingText(tokenizer, config.stop, begins=own)
            writings.append(Writing(Completion(number, sample), text))
    details: dict[int, list[TokenDetails]] = {}  # of each prompt
    while decoder.busy:
        for token in decoder.advance():
            writing = writings[token.sequence]
            completion = writing.completion
            if completion.reason:  # a beam continues after its stop text
                completion.score = token.score
                continue
            if token.prompt_details is not None:
                details[completion.prompt] = token.prompt_details
            completion.prompt_details = details.get(completion.prompt)
            piece = writing.add(token)
            if writing.text.ended and not token.ended:
                decoder.end(token.sequence)
            if piece or completion.reason:
                yield piece, completion


def begins_text(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether what continues the ids of ``prompt`` is a text of its own: they have no text."""
    return not tokenizer.decode_bytes(prompt[:99])


def new_decoder(
    model: tuple[GPT, Tokenizer],
    config: GenerationConfig,
    *,
    batch_size: int = 32,
    draft: tuple[GPT, Tokenizer] | None = None,
    num_draft_tokens: int = 0,
    ends: Collection[int] = (),
    prefix: Prefix | None = None,
) -> Continuer:
    """The decoder for the settings of ``config``: sampling, or a beam search. With
    ``num_draft_tokens``, a speculative one that takes its guesses from ``draft``, or without a
    draft from the text itself. A text also ends at the ids ``ends``. Sampling begins with what
    ``prefix`` has read.
    """
    network, tokenizer = model
    size, end = tokenizer.vocab_size, ends_of(tokenizer).union(ends)
    check_number("num_draft_tokens", num_draft_tokens, 0)
    if config.num_beams > 1 and num_draft_tokens:
        raise UsageError("num_beams and num_draft_tokens are both given; give only one of them")
    if draft is not None and not num_draft_tokens:
        raise UsageError("num_draft_tokens is 0, and a draft needs at least 1 (5 is a good number)")
    if config.num_beams > 1:
        return BeamSearch(network, config, vocab_size=size, end_of_text=end)
    if not num_draft_tokens:
        return Decoder(
            network,
            config,
            batch_size=batch_size,
            vocab_size=size,
            end_of_text=end,
            prefix=prefix,
        )
    guesser: Draft = PromptLookup()
    if draft is not None:
        if fingerprint(draft[1]) != fingerprint(tokenizer):
            raise UsageError(
                "the draft model's tokenizer differs from the model's, and must be the same"
            )
        guesser = DraftModel(
            draft[0], config, vocab_size=size, seed=config.seed, cache=config.cache
        )
    return Speculator(
        network,
        config,
        guesser,
        num_draft_tokens=num_draft_tokens,
        vocab_size=size,
        end_of_text=end,
    )


def settings_of(settings: dict[str, Any], options: Sequence[str]) -> GenerationConfig:
    """The configuration from a caller's ``settings``. ``UsageError`` for a name that it does not
    have; the nearest of its fields and of the caller's other ``options`` is suggested.
    """
    names = [setting.name for setting in fields(GenerationConfig)]
    for name in settings:
        if name not in names:
            advice = nearest(name, [*names, *options]) or f"; choose from {', '.join(names)}"
            raise UsageError(f"{quoted(name)} is not a setting{advice}")
    return GenerationConfig(**settings | ({"stop": ()} if settings.get("stop") is None else {}))


def _listed(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    """``prompts`` as a list, also for a single text; ``UsageError`` if they are not prompts."""
    try:
        listed: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError:  # also of a tensor without dimensions
        raise UsageError(
            f"prompts is {quoted(prompts)}, and must be a text, or a list of texts or lists of "
            "token ids"
        ) from None
    for prompt in listed:
        if not hasattr(prompt, "__iter__"):
            raise UsageError(
                f"prompts contains {quoted(prompt)}, and takes texts and lists of token ids"
            )
    return listed


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The prompt's ids. A text begins with the tokenizer's first tokens. An empty prompt without
    them becomes the end-of-text token that separates documents.
    """
    if not isinstance(prompt, str):
        return token_ids("the prompt", prompt) or [tokenizer.end_of_text]
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not UTF-8 text: {error.reason} at character {error.start}"
        ) from None
    return prompt_ids(tokenizer, prompt)


@dataclass
class Writing:
    """A completion, and its text as it grows."""

    completion: Completion
    text: "GrowingText"

    def add(self, token: Token) -> str:
        """Add the next token to the completion; returns the piece of text that becomes certain."""
        completion, text = self.completion, self.text
        completion.tokens.append(token.id)
        if token.logprob is not None:
            completion.logprobs.append(token.logprob)
            completion.top.append(token.top)
        piece = text.add(token.id)
        completion.reason = token.ended
        completion.score = token.score
        if token.ended:
            piece += text.finish()
        if text.stopped:
            completion.reason = "stop"
        completion.text += piece
        return piece


class GrowingText:
    """One continuation as it grows: tokens in, text out that later tokens cannot change.

    It holds back the bytes of an incomplete character, and an end that can still become a stop
    text. A text that ``begins`` with the continuation loses the space that a vocabulary of
    SentencePiece puts before a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, begins: bool = False
    ) -> None:
        self._tokenizer, self._ends = tokenizer, ends_of(tokenizer)
        self._opening = opening_space(tokenizer) if begins else b""
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.ended = False
        self.stopped = False
        """Whether a stop text ended the continuation."""

    def add(self, token: int) -> str:
        """The text that becomes certain with ``token``; it may be empty."""
        if self.ended:
            return ""
        if token in self._ends:
            return self.finish()
        content = self._tokenizer.decode_bytes([token])
        if content:
            content, self._opening = content.removeprefix(self._opening), b""
        return self._release(self._decoder.decode(content))

    def finish(self) -> str:
        """End the continuation, and return the text that was held back."""
        if self.ended:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.ended:
            text += self._held
        self.ended = True
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [i for i in map(text.find, self._stop) if i >= 0]
        if found:
            self.ended = self.stopped = True
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
