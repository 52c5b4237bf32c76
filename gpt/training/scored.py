"""Texts with their rewards: those of a step on all processes, and the batch that a process learns
from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.data.batches import Batch
from gpt.training.parallel import World


@dataclass(frozen=True)
class Scored:
    """Texts with their advantages ``[B]``, and where a loss needs them the log-probabilities of
    their tokens ``[B, T]`` under the policy that wrote them and under the start model.
    """

    texts: Batch
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    def n_targets(self) -> int:
        """The number of texts."""
        return len(self.advantages)

    def split(self, size: int) -> "Iterator[Scored]":
        """Batches of ``size`` texts."""
        parts = self.texts.split(size), self.advantages.split(size)
        olds, references = (
            [None] * len(self.advantages) if t is None else t.split(size)
            for t in (self.old, self.reference)
        )
        return (Scored(*part) for part in zip(*parts, olds, references, strict=False))

    def to(self, device: torch.device) -> "Scored":
        """The texts on ``device``."""
        old, reference = (None if t is None else t.to(device) for t in (self.old, self.reference))
        return Scored(self.texts.to(device), self.advantages.to(device), old, reference)


@dataclass
class Round:
    """What a step wrote on all processes: K texts of each prompt, one prompt after the other."""

    step: int
    tokens: list[list[int]]
    rewards: list[float]
    old: list[list[float]]
    """Log-probabilities of the tokens under the policy that wrote them; empty if no loss needs
    them."""


def gathered(rows: list[list[Any]], world: World, dtype: torch.dtype) -> list[list[Any]]:
    """The rows of all processes, which have the same number of them, in the order of the ranks."""
    if world.size == 1:
        return rows
    longest = world.largest(max(map(len, rows)))
    table = torch.zeros(world.size, len(rows), longest + 1, dtype=dtype)
    for i, row in enumerate(rows):
        table[world.rank, i, 0] = len(row)
        table[world.rank, i, 1 : len(row) + 1] = torch.tensor(row, dtype=dtype)
    return [row[1 : 1 + int(row[0])] for row in world.sum(table).flatten(0, 1).tolist()]


def spread_out(rows: list[list[float]], counted: Tensor) -> Tensor:
    """A number of ``rows`` at each ``counted`` position ``[B, T]``, and 0 elsewhere."""
    table = torch.zeros(counted.shape)
    table[counted] = torch.tensor([number for row in rows for number in row])
    return table
