"""What cannot be decoded, told in a sentence before anything is."""

from collections.abc import Iterable, Sequence

import torch

from gpt.config import GenerationConfig, UsageError, quoted, token_ids
from gpt.device import check_memory
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

SEQUENCE_BYTES = 3000
"""Host memory of a sequence that waits or runs, without its tokens."""
COPIES_OF_LOGITS = 6
"""In float32, while filters sort them."""


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
) -> list[int]:
    """The prompt's ids as Python's integers; ``UsageError`` if it cannot be continued."""
    context, prompt = model.config.context_length, token_ids("the prompt", prompt)
    if not len(prompt):
        raise UsageError("the prompt has no tokens, and there must be one to continue")
    if config.past_context == "stop" and len(prompt) > context:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, and the model's context_length is "
            f"{context:,}; shorten it, or let past_context be 'slide'"
        )
    check_ids("the prompt", prompt, vocab_size)
    return prompt


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """``UsageError`` for an id that no token has."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UsageError(
                f"{what} has the token id {quoted(i)}, and the vocabulary ends at {vocab_size - 1}"
            )


def check_number(name: str, value: int, at_least: int) -> None:
    """``UsageError`` unless ``value`` is a whole number in its bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is {quoted(value)}, and must be a whole number")
    if value < at_least:
        raise UsageError(f"{name} is {quoted(value)}, and must be at least {at_least}")


def check_sequences(n: int, tokens: int) -> None:
    """``UsageError`` if the host has no memory for ``n`` sequences of so many ``tokens`` in all."""
    check_memory(
        f"{n:,} sequences",
        n * SEQUENCE_BYTES + 8 * tokens,
        torch.device("cpu"),
        advice="num_samples or the number of prompts must be smaller",
    )


def check_cache(model: GPT, rows: int, length: int) -> None:
    """``UsageError`` if the model's device has no memory for the keys, values and logits of
    ``rows`` sequences of ``length`` tokens.
    """
    dtype = model.cache_dtype or model.dtype
    cache = KVCache(model.config, batch_size=rows, capacity=length, dtype=dtype, device="meta")
    check_memory(
        f"the keys, values and logits of {rows:,} sequences of up to {length:,} tokens",
        cache.nbytes + rows * COPIES_OF_LOGITS * 4 * model.config.vocab_size,
        model.device,
        advice="a smaller batch_size, num_beams or max_new_tokens needs less",
    )
