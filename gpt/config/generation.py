"""Settings of sampling and of generation."""

import math
import numbers
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt.config.checks import UsageError, check, number, quoted


def token_ids(what: str, ids: Iterable[Any]) -> list[int]:
    """``ids`` of any integer type as Python integers; ``UsageError`` for anything else."""
    try:
        if isinstance(ids, str | bytes):
            raise TypeError
        items = list(ids)
    except TypeError:
        raise UsageError(f"{what} is {quoted(ids)}, and must be a list of token ids") from None
    for i, item in enumerate(items):
        try:
            if isinstance(item, bool):
                raise TypeError
            items[i] = operator.index(item)
        except (TypeError, RuntimeError):  # RuntimeError: a tensor without data
            raise UsageError(f"{what} has {quoted(item)}, which is not a token id") from None
    return items


def unescaped(text: str) -> str:
    r"""Replace the escapes in a typed text: ``\n`` newline, ``\r`` return, ``\t`` tab, ``\\``
    backslash.
    """
    escapes = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda found: escapes[found[1]], text)


CacheFormat = Literal["float", "int8"]
LEAST_TEMPERATURE = 1e-5
"""The smallest temperature above 0: logits divided by a smaller one would overflow."""
_MOST_BIAS = 1e30
"""Far beyond any logit, and finite in bfloat16 and float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. The settings apply in the order of the fields, except the
    temperature, which applies after the penalties and before top_k.
    """

    temperature: float = number(0.8, at_least=0)
    """Divides the logits: below 1 favours likely tokens, above 1 unlikely ones; 0 always takes the
    likeliest token."""
    bias: dict[int, float] = field(default_factory=dict)
    """Maps token ids to numbers that are added to their logits."""
    ban: tuple[int, ...] = ()
    """Token ids that are never generated."""
    repetition_penalty: float = number(1.0, above=0)
    """Divides the logits of tokens that the prompt or the text already contains; above 1
    discourages them."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that was generated already."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it was generated."""
    top_k: int = number(0, at_least=0)
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Sample from the smallest set of likeliest tokens whose probabilities sum to at least p."""
    min_p: float = number(0.0, at_least=0, at_most=1)
    """Sample from the tokens that are at least min_p times as likely as the likeliest one."""

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UsageError(
                f"temperature is {self.temperature}, and must be 0 (the likeliest token) or at "
                f"least {LEAST_TEMPERATURE}"
            )
        if not isinstance(self.bias, Mapping):
            raise UsageError(
                f"bias is {quoted(self.bias)}, and must map token ids to numbers, as in {{5: -1.0}}"
            )
        bias: dict[int, Any] = dict(
            zip(token_ids("bias", self.bias), self.bias.values(), strict=True)
        )
        for token, added in bias.items():
            is_number = isinstance(added, numbers.Real) and not isinstance(added, bool)
            if not (is_number and abs(added) < math.inf):
                raise UsageError(
                    f"bias has {quoted(added)} for the token {quoted(token)}, and must have a "
                    "number (use ban for tokens that must never be generated)"
                )
            if abs(added) > _MOST_BIAS:
                raise UsageError(
                    f"bias has {quoted(added)} for the token {quoted(token)}, and must be from "
                    f"{-_MOST_BIAS:g} to {_MOST_BIAS:g}"
                )
        bias = {token: float(number) for token, number in bias.items()}
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "ban", tuple(token_ids("ban", self.ban)))

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens that were generated already change the next one."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How a prompt is continued."""

    max_new_tokens: int = number(500, at_least=1)
    """Maximum number of tokens to generate for each sample."""
    min_new_tokens: int = number(0, at_least=0)
    """End-of-text is not generated before this many tokens."""
    num_samples: int = number(1, at_least=1)
    """Number of continuations of the prompt. The prompt is processed once for all of them."""
    num_beams: int = number(1, at_least=1)
    """Number of beams. Above 1: beam search, which draws nothing and returns the num_samples best
    beams."""
    length_penalty: float = number(1.0, at_least=-20, at_most=20)
    """A beam's log-probability is divided by its length to this power: above 0 favours long
    texts."""
    early_stopping: Literal["likely", "first", "never"] = "likely"
    """When a beam search ends. likely: when a better beam is unlikely; first: when num_beams beams
    are complete; never: when no better beam is possible."""
    stop: tuple[str, ...] = ()
    """One or more texts at which a sample ends; they are not part of the output. On the command
    line \\n is a newline, \\t a tab, and \\\\ a backslash."""
    past_context: Literal["slide", "stop", "sinks"] = "slide"
    """What happens when the context is full. slide: the model reads the newer half again and
    continues; stop: the text ends; sinks: continue without reading again (only models in which
    every layer has an attention window)."""
    cache: CacheFormat = "float"
    """Format of the keys and values of earlier tokens. float: the model's; int8: 8 bits and a scale
    for each head, about half the memory of bfloat16, with a small loss (docs/generation.md)."""
    logprobs: int | None = number(None, at_least=0)
    """Also return the log-probability of each token and of this many likeliest alternatives (in
    Python, and in the lines of out)."""
    seed: int | None = number(None, at_least=0)
    """Seed of the sampling: the same seed gives the same text. Without it, every run
    gives another text."""

    def __post_init__(self) -> None:
        stop: Any = self.stop  # a single text is accepted as well
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else stop)
        super().__post_init__()
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            raise UsageError(
                f"num_samples is {self.num_samples}, and must be at most num_beams "
                f"({self.num_beams})"
            )
        if "" in self.stop:
            raise UsageError("stop has an empty text; each text must have at least one character")
