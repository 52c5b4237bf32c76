"""Prefill and decode over a cache: token ids to more token ids.

The prompt goes through the model once, and each new token once. When the context is full, one of
two policies holds:

``stop``
    ends. Every token was predicted from all that stood before it.
``slide``
    keeps the newer half of the context, reads it again from position 0, and goes on. Positions are
    absolute, so cached keys cannot be moved; the price is one prefill of ``context_length / 2``
    tokens for each ``context_length / 2`` new ones, and that right after a slide the model sees
    only that half.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from gpt.config import UsageError
from gpt.model.gpt import GPT

PastContext = Literal["slide", "stop"]


@torch.inference_mode()
def decode(
    model: GPT,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    num_samples: int = 1,
    past_context: PastContext = "slide",
) -> Iterator[Tensor]:
    """New tokens for ``prompt`` ``[B, T]``, a tensor ``[B * num_samples]`` at a time.

    ``choose`` takes the logits of the next token, ``[B * num_samples, V]``, and gives the tokens.
    The samples of a prompt share its prefill. The model is in evaluation mode meanwhile. Under
    ``stop`` a prompt longer than the context raises ``UsageError``; under ``slide`` its last
    ``context_length`` tokens count.
    """
    context = model.config.context_length
    if past_context == "stop" and prompt.shape[1] > context:
        raise UsageError(
            f"the prompt has {prompt.shape[1]:,} tokens, and the model's context_length is "
            f"{context:,}; shorten it, or let past_context be 'slide'"
        )
    training = model.training
    model.eval()
    try:
        yield from _decode(model, prompt, max_new_tokens, choose, num_samples, past_context)
    finally:
        model.train(training)


def _decode(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    num_samples: int,
    past_context: PastContext,
) -> Iterator[Tensor]:
    context = model.config.context_length
    seen = prompt[:, -context:]
    capacity = min(context, seen.shape[1] + max_new_tokens)
    cache = model.new_cache(len(seen), capacity=capacity)
    logits = model(seen, cache=cache, last_only=True)[:, -1]
    if num_samples > 1:
        cache = cache.expand(num_samples)
        logits = logits.repeat_interleave(num_samples, dim=0)
        seen = seen.repeat_interleave(num_samples, dim=0)
    for remaining in reversed(range(max_new_tokens)):
        token = choose(logits)
        yield token
        if not remaining:
            return
        seen = torch.cat([seen, token[:, None]], dim=1)
        unread = token[:, None]
        if cache.length == context:
            if past_context == "stop":
                return
            seen = unread = seen[:, -max(1, context // 2) :]
            cache.truncate(0)
        logits = model(unread, cache=cache, last_only=True)[:, -1]
