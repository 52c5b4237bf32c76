"""Checks before decoding: settings, prompts and memory."""

from collections.abc import Iterable, Sequence

import torch

from gpt.config import CacheFormat, GenerationConfig, UsageError, quoted, token_ids
from gpt.device import check_memory
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

SEQUENCE_BYTES = 3000
"""Host memory of one sequence, without its tokens."""
COPIES_OF_LOGITS = 6
"""Copies of the logits in float32 while the filters sort them."""


def check_settings(model: GPT, config: GenerationConfig, vocab_size: int) -> None:
    """``UsageError`` if a bias or a ban names an id outside of the vocabulary, or if the tokenizer
    has more tokens than the model.
    """
    if vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size:,} tokens, and the model {model.config.vocab_size:,}"
        )
    check_ids("bias", config.bias, vocab_size)
    check_ids("ban", config.ban, vocab_size)
    if config.past_context == "sinks":
        shape = model.config
        windows = all(kind.window for kind in model.kinds) and shape.copy == "none"
        if not windows or shape.most_positions() is not None:
            raise UsageError(
                "past_context is 'sinks', which needs model.window in every layer and positions "
                f"without an end; the model has position '{shape.position}' and layers "
                f"'{shape.layer_pattern()}': use 'slide' or 'stop'"
            )


def check_prompt(
    model: GPT, prompt: Sequence[int], config: GenerationConfig, vocab_size: int
) -> list[int]:
    """The prompt's ids as Python integers; ``UsageError`` if the model cannot continue it."""
    context, prompt = model.config.context_length, token_ids("the prompt", prompt)
    if not len(prompt):
        raise UsageError("the prompt has no tokens, and must have at least one")
    if config.past_context == "stop" and len(prompt) > context:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, and the model's context_length is "
            f"{context:,}; shorten the prompt, or set past_context to 'slide'"
        )
    check_ids("the prompt", prompt, vocab_size)
    return prompt


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """``UsageError`` for an id outside of the vocabulary."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UsageError(
                f"{what} has the token id {quoted(i)}, and the vocabulary ends at {vocab_size - 1}"
            )


def check_number(name: str, value: int, at_least: int) -> None:
    """``UsageError`` unless ``value`` is a whole number and is ``at_least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is {quoted(value)}, and must be a whole number")
    if value < at_least:
        raise UsageError(f"{name} is {quoted(value)}, and must be at least {at_least}")


def check_sequences(n: int, tokens: int) -> None:
    """``UsageError`` if the host has no memory for ``n`` sequences with ``tokens`` in total."""
    check_memory(
        f"{n:,} sequences",
        n * SEQUENCE_BYTES + 8 * tokens,
        torch.device("cpu"),
        advice="use fewer prompts or a smaller num_samples",
    )


def check_cache(model: GPT, rows: int, length: int, stored_as: CacheFormat = "float") -> None:
    """``UsageError`` if the model's device has no memory for the keys, values and logits of
    ``rows`` sequences of up to ``length`` tokens.
    """
    dtype = model.cache_dtype or model.dtype
    cache = KVCache(
        model.config,
        batch_size=rows,
        capacity=length,
        dtype=dtype,
        device="meta",
        stored_as=stored_as,
    )
    check_memory(
        f"the keys, values and logits of {rows:,} sequences of up to {length:,} tokens",
        cache.nbytes + rows * COPIES_OF_LOGITS * 4 * model.config.vocab_size,
        model.device,
        advice="use a smaller batch_size, num_beams or max_new_tokens, or cache int8",
    )
