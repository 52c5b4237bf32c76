"""How the next token is drawn, and how a prompt is continued."""

import math
import numbers
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt.config.checks import UsageError, check, number, quoted


def token_ids(what: str, ids: Iterable[Any]) -> list[int]:
    """``ids``, of whatever type of integers, as Python's own; ``UsageError`` for anything else."""
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
        except (TypeError, RuntimeError):  # RuntimeError: of a tensor without data
            raise UsageError(f"{what} has {quoted(item)} in it, which is no token id") from None
    return items


def unescaped(text: str) -> str:
    r"""A text that was typed: ``\n`` is a newline, ``\t`` a tab, and ``\\`` a backslash."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], "\\"), text)


_MOST_BIAS = 1e30
"""Far beyond any logit, and a number in bfloat16 and float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. What is set applies in the order of the fields, but for the
    temperature, which comes between the penalties and top_k.
    """

    temperature: float = number(0.8, at_least=0)
    """Divides the logits: below 1 is safer, above 1 is wilder; 0 takes the likeliest token."""
    bias: dict[int, float] = field(default_factory=dict)
    """Token ids, each with a number that is added to its logit."""
    ban: tuple[int, ...] = ()
    """Token ids that are never written."""
    repetition_penalty: float = number(1.0, above=0)
    """Divides the logits of tokens that the prompt or the text has already; above 1 discourages."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written already."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens for each time that they were written."""
    top_k: int = number(0, at_least=0)
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Draw among the fewest likeliest tokens whose probabilities reach p."""
    min_p: float = number(0.0, at_least=0, at_most=1)
    """Draw among the tokens that are at least p times as likely as the likeliest."""

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.temperature < 1e-5:
            raise UsageError(
                f"temperature is {self.temperature}, and must be 0 (the likeliest token) or at "
                "least 1e-05"
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
                    "number (ban takes what is never to be written)"
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
        """Whether what was written already matters."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How a prompt is continued."""

    max_new_tokens: int = number(500, at_least=1)
    """The most tokens to write for each sample."""
    min_new_tokens: int = number(0, at_least=0)
    """Tokens before which a document does not end."""
    num_samples: int = number(1, at_least=1)
    """Continuations of the same prompt; it goes through the model once."""
    num_beams: int = number(1, at_least=1)
    """Beams of a beam search, which draws nothing: samples are the best ones; 1: no search."""
    length_penalty: float = number(1.0, at_least=-20, at_most=20)
    """Divides a beam's log-probability by its length to this power: above 0 favours long ones."""
    early_stopping: Literal["likely", "first", "never"] = "likely"
    """When a beam search ends: as soon as no better beam is likely, with the first num_beams that
    are complete, or never before no better one is possible."""
    stop: tuple[str, ...] = ()
    """One or more texts at which a sample ends; they are not shown. On the command line \\n is a
    newline, \\t a tab, and \\\\ a backslash."""
    past_context: Literal["slide", "stop", "sinks"] = "slide"
    """When the context is full: slide re-reads its newer half and goes on, stop ends the text,
    sinks goes on without reading anything again (models whose layers all have a window)."""
    logprobs: int | None = number(None, at_least=0)
    """Give log-probabilities as well, in Python and in the lines of out: of each token, and of this
    many likeliest ones."""
    seed: int | None = number(None, at_least=0)
    """Of the draws: the same seed gives a prompt the same text. Without it, a new one each time."""

    def __post_init__(self) -> None:
        stop: Any = self.stop  # one text is taken too
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else stop)
        super().__post_init__()
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            raise UsageError(
                f"num_samples is {self.num_samples}, and a search of {self.num_beams} beams gives "
                "no more than these"
            )
        if "" in self.stop:
            raise UsageError("stop has an empty text in it, and each must have a character")
