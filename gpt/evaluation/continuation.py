"""Generation for tasks of lm-evaluation-harness. The options mean the same as in its ``hf`` backend
and in transformers' ``generate``.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from gpt.config import UsageError, quoted
from gpt.data.tokenizer import END_OF_TEXT, Tokenizer, decode, prompt_ids
from gpt.generation.text import generate
from gpt.model.gpt import GPT

MAX_GEN_TOKS = 256
"""The limit if a task gives none."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit; if several are given, the first one here counts."""
SAMPLING = {"top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The other options, with their defaults."""


def continued(model: GPT, tokenizer: Tokenizer, context: str, options: Mapping[str, Any]) -> str:
    """Continue ``context`` up to the first of the texts ``until`` or the end of the document.

    If ``do_sample`` is not given, a ``temperature`` above 0 samples; if it is false, the
    temperature is 0. ``max_length`` includes the context's tokens. If the context leaves too little
    room for ``max_gen_toks``, its beginning is cut. ``UsageError`` if nothing of it would be left,
    and for options that are not supported.
    """
    given = {name: value for name, value in options.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    limit = _limit([given.pop(name) for name in LIMITS if name in given])
    room = model.config.context_length - limit
    if room < 1:
        raise UsageError(
            f"max_gen_toks is {limit}, and the model's context_length is "
            f"{model.config.context_length}, which leaves no room for the prompt; use a smaller "
            "max_gen_toks"
        )
    ids = prompt_ids(tokenizer, context)
    if len(ids) > room:
        logging.getLogger(__name__).warning(
            "the context has %d tokens; only the last %d are used", len(ids), room
        )
    ids = ids[-room:]
    n = given.pop("max_length", len(ids) + limit) - len(ids)
    if not 0 < n <= model.config.context_length - len(ids):
        raise UsageError(
            f"the context has {len(ids)} tokens, and max_gen_toks or max_length allows "
            f"{len(ids) + n} in all; it must allow more, and at most the model's context_length "
            f"({model.config.context_length})"
        )
    stop = [text for text in (*until, _end_of_text(tokenizer)) if text]
    [made] = generate(
        (model, tokenizer),
        [ids],
        max_new_tokens=1 if "" in until else n,
        stop=tuple(stop),
        seed=int(torch.randint(2**62, ())),  # so that torch's seed decides
        **_sampling(given),
    )
    text = decode(tokenizer, made.tokens)
    for end in stop:
        text = text.partition(end)[0]
    return text


def _limit(given: list[Any]) -> int:
    try:
        return int(given[0]) if given else MAX_GEN_TOKS
    except (ValueError, TypeError):
        raise UsageError(
            f"max_gen_toks is {quoted(given[0])}, and must be a whole number"
        ) from None


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    temperature = given.pop("temperature", 0.0)
    if not isinstance(temperature, int | float):
        raise UsageError(f"temperature is {quoted(temperature)}, and must be a number")
    do_sample = given.pop("do_sample", temperature > 0)
    unknown = given.keys() - SAMPLING.keys()
    if unknown:
        known = ", ".join(["until", *LIMITS, "max_length", "do_sample", "temperature", *SAMPLING])
        raise UsageError(f"unknown generation option {quoted(min(unknown))}; choose from {known}")
    if not do_sample:
        return {name: given[name] for name in ("repetition_penalty",) if name in given} | {
            "temperature": 0.0
        }
    if temperature == 0:
        raise UsageError("temperature is 0, and must be above 0 with do_sample")
    return SAMPLING | given | {"temperature": temperature}


def _end_of_text(tokenizer: Tokenizer) -> str:
    special: Mapping[str, int] = getattr(tokenizer, "special", {})
    end = tokenizer.end_of_text
    return next((text for text, i in special.items() if i == end), END_OF_TEXT)
