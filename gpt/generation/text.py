"""Prompts to text: as it is made, in whole characters, up to a stop text or the end of the
document.
"""

import codecs
from collections.abc import Iterator, Sequence

import torch

from gpt.config import GenerationConfig, UsageError
from gpt.data.tokenizer import Tokenizer
from gpt.generation.decode import PastContext, decode
from gpt.generation.sampling import choose
from gpt.model.gpt import GPT


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = (),
    past_context: PastContext = "slide",
    seed: int | None = None,
) -> list[str]:
    """Continuations of ``prompt``, without it: ``num_samples`` texts that differ by their draws.

    An empty prompt is the start of a document. The same ``seed`` gives the same texts; without one
    they are new each time. Raises ``UsageError`` for settings that make no sense.
    """
    config = GenerationConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        stop=_texts(stop),
        past_context=past_context,
        seed=seed,
    )
    texts = [""] * num_samples
    for row, piece in stream_samples(model, tokenizer, prompt, config):
        texts[row] += piece
    return texts


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = (),
    past_context: PastContext = "slide",
    seed: int | None = None,
) -> Iterator[str]:
    """One continuation of ``prompt`` in pieces as they are made; joined, they are what
    :func:`generate` gives.
    """
    config = GenerationConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stop=_texts(stop),
        past_context=past_context,
        seed=seed,
    )
    for _, piece in stream_samples(model, tokenizer, prompt, config):
        yield piece


def stream_samples(
    model: GPT, tokenizer: Tokenizer, prompt: str, config: GenerationConfig
) -> Iterator[tuple[int, str]]:
    """Pieces of text with the number of the sample that each belongs to."""
    device = model.embed.weight.device
    generator = torch.Generator(device)
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
    samples = [Sample(tokenizer, config.stop) for _ in range(config.num_samples)]
    for tokens in decode(
        model,
        ids,
        max_new_tokens=config.max_new_tokens,
        # A vocabulary may be padded with rows that no token has.
        choose=lambda logits: choose(logits[:, : tokenizer.vocab_size], config, generator),
        num_samples=config.num_samples,
        past_context=config.past_context,
    ):
        for row, (sample, token) in enumerate(zip(samples, tokens.tolist(), strict=True)):
            if piece := sample.add(token):
                yield row, piece
        if all(sample.ended for sample in samples):
            return
    for row, sample in enumerate(samples):
        if piece := sample.finish():
            yield row, piece


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; an empty one is the end-of-text that stands between documents."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not UTF-8 text: {error.reason} at character {error.start}"
        ) from None
    ids: list[int] = tokenizer.encode(prompt).tolist()
    return ids or [tokenizer.end_of_text]


class Sample:
    """One continuation as it grows: tokens in, text out that will not have to be taken back.

    Held back are the bytes of a character that is not whole, and an end that may become a stop
    text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text that ``token`` makes certain; it may be empty."""
        if self.ended:
            return ""
        if token == self._tokenizer.end_of_text:
            return self.finish()
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """The text that was still held back; nothing follows it."""
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
            self.ended = True
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
