"""What ends a sequence, and the policies for a full context.

``stop``
    The sequence ends. The model predicts every token from all the tokens before it.
``slide``
    The model reads the newer half of the context again, from position 0, and the sequence goes on.
    Cached keys cannot move, since positions are absolute. The cost is one prefill of
    ``context_length / 2`` tokens for every ``context_length / 2`` new ones. Right after a slide,
    the model sees only that half.
``sinks``
    The sequence goes on. It needs a model whose layers all have an attention window, and positions
    that have no end: then the cache is a ring, memory and time per token are constant, and the
    model sees the attention window and the first tokens (``model.sinks``; arXiv:2309.17453).

Beam search always stops: after a slide, a beam's tokens would no longer be predicted from one text.
"""

import sys
from collections.abc import Collection, Sequence
from typing import Literal

from gpt.config import GenerationConfig
from gpt.model.gpt import GPT

Reason = Literal["end_of_text", "length", "context", "stop"]
"""Why a sequence ends; ``stop`` is a stop text, or a caller's wish."""


Ends = int | Collection[int] | None
"""The ids that end a text: one, several, or none."""


class Context:
    """A model's context, and the configuration's policy for it.

    ``tokens`` are always those of one sequence, and the model has not read the last one yet. So a
    sequence has up to ``length`` tokens that the model can read, and one more when it is full.
    """

    def __init__(self, model: GPT, config: GenerationConfig, end_of_text: Ends) -> None:
        is_endless = config.past_context == "sinks"
        self.length = sys.maxsize if is_endless else model.config.context_length
        self.config = config
        several = () if end_of_text is None else end_of_text
        self.ends = frozenset([several] if isinstance(several, int) else several)

    def fit(self, prompt: list[int]) -> list[int]:
        """The part of ``prompt`` that the model reads: its last ``length`` tokens."""
        return prompt[-self.length :]

    def room(self, tokens: Sequence[int]) -> int:
        """How many tokens the model can predict before the context is full."""
        return max(0, self.length + 1 - len(tokens))

    def slide(self, tokens: list[int]) -> list[int]:
        """The newer half of the context if it is full, else ``tokens``."""
        return tokens if self.room(tokens) else tokens[-max(1, self.length // 2) :]

    def ended(self, tokens: Sequence[int], written: int) -> Reason | None:
        """Why a sequence ends after its last token, the ``written``-th new one, if it does."""
        if tokens[-1] in self.ends:
            return "end_of_text"
        if written == self.config.max_new_tokens:
            return "length"
        if not self.room(tokens) and self.config.past_context == "stop":
            return "context"
        return None


def newest(tokens: list[int], length: int) -> list[int]:
    """Between half of a context of ``length`` tokens and all of it: the newest ``tokens``.

    The start moves by half a context at a time, so that most calls continue a cached text.
    """
    half = max(1, length // 2)
    return tokens[max(0, -(-(len(tokens) - length) // half)) * half :]
