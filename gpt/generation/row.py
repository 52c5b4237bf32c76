"""A row of a decoder's batch: one sequence, its settings, and the choice of its next token."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from gpt.config import GenerationConfig, SamplingConfig
from gpt.generation.context import Context, Reason
from gpt.generation.logprobs import TokenDetails
from gpt.generation.sampling import (
    Details,
    History,
    choose,
    describe,
    marked,
    on_host,
    penalise,
)


@dataclass(eq=False)
class Row:
    """One sequence of a decoder's batch."""

    sequence: int
    config: GenerationConfig
    context: Context
    tokens: list[int]  # the ones in the context, and a last one that the model has not read
    draws: np.random.Generator
    describes: bool  # its prompt
    written: int = 0
    ended: Reason | None = None
    kind: Hashable = field(init=False)  # rows of one kind choose their tokens together
    prompt_details: list[TokenDetails] | None = None  # until the first token is written

    def __post_init__(self) -> None:
        self.kind = _kind(self.config, self.context.ends)

    @property
    def wants_details(self) -> bool:  # of its prompt
        return self.written == 0 and self.describes

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.config.max_new_tokens - self.written


def _kind(config: GenerationConfig, ends: frozenset[int]) -> Hashable:
    """What the choice of a token depends on, besides the numbers that are drawn."""
    settings = {field.name: getattr(config, field.name) for field in fields(SamplingConfig)}
    settings["bias"] = tuple(config.bias.items())
    return (config.logprobs, ends, *settings.values())


def next_tokens(
    rows: Sequence[Row], logits: Tensor, history: History | None, vocab_size: int
) -> tuple[Tensor, list[tuple[int, Details]]]:
    """Choose the next token of each row, those of one kind together: the tokens ``[B]``, and each
    with its details. ``logits`` ``[B, V]`` may have more columns than ``vocab_size``.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(row.kind, []).append(i)
    if len(alike) == 1:
        return _choose(rows, logits, history, vocab_size)
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    found: dict[int, tuple[int, Details]] = {}
    for own in alike.values():
        part = None if history is None else history.of(own)
        chosen[own], details = _choose([rows[i] for i in own], logits[own], part, vocab_size)
        found |= zip(own, details, strict=True)
    return chosen, [found[i] for i in range(len(rows))]


def _choose(
    rows: Sequence[Row], every: Tensor, history: History | None, vocab_size: int
) -> tuple[Tensor, list[tuple[int, Details]]]:
    """As :func:`next_tokens`, for rows of one kind."""
    config, logits = rows[0].config, every[:, :vocab_size]
    early = [i for i, row in enumerate(rows) if row.written < row.config.min_new_tokens]
    history = history if config.has_penalties else None
    processed = penalise(logits, config, history, early=early, ends=rows[0].context.ends)
    numbers = [row.draws.random() for row in rows] if config.temperature else []
    chosen = choose(processed, config, numbers)
    ids = on_host(marked(chosen, processed))
    details = describe(every, chosen, config.logprobs, vocab_size)
    return chosen, list(zip(ids, details, strict=True))
