"""Batches of windows. The tokens are cut into windows of ``context_length``;
:mod:`gpt.data.order` says which of them each step takes.

A window may hold several documents. Across them, it is one text (``crossing``), or attention stays
inside each (``packed``); :mod:`gpt.data.document_windows` puts whole documents into windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import UsageError
from gpt.data.shards import Shard, Shards
from gpt.data.tokenizer import Tokenizer

IGNORED = -100
"""Marks a target that does not count in the loss."""


@dataclass(frozen=True)
class Batch:
    """``tokens`` and ``targets`` (the next tokens): both ``[B, T]`` of int64."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None = None
    """The number of each token's document, ``[B, T]``, where a row has several and attention stays
    inside each."""

    def n_targets(self) -> int:
        """The number of targets that count in the loss."""
        return int((self.targets != IGNORED).sum())

    def split(self, size: int) -> "Iterator[Batch]":
        """Batches of ``size`` sequences; the last one may be smaller."""
        return (
            Batch(*parts) for parts in zip(*(t.split(size) for t in self._tensors()), strict=True)
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``. A copy to CUDA is asynchronous."""
        if device.type != "cuda":
            return Batch(*(tensor.to(device) for tensor in self._tensors()))
        # One contiguous tensor, because a view with gaps would be copied through unpinned memory.
        together = torch.stack(self._tensors()).pin_memory()  # 2 or 3, B, T
        return Batch(*together.to(device, non_blocking=True))

    def _tensors(self) -> list[Tensor]:
        tensors = [self.tokens, self.targets]
        return tensors if self.documents is None else [*tensors, self.documents]


@dataclass(frozen=True)
class Boundary:
    """Where a document ends and the next one begins in a stream of tokens.

    The end-of-text between them begins the next one, as it begins an empty prompt. If the
    tokenizer's documents begin with tokens of their own, it belongs to the one that it ends, and
    nothing is learned from what follows it.
    """

    end_of_text: int
    begins: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """The boundary of a tokenizer's documents."""
        return cls(tokenizer.end_of_text, begins=not tokenizer.first)


class Windows(Protocol):
    """Training data as windows of one length."""

    def __len__(self) -> int: ...

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """The batch of the windows with these numbers ``[B]``."""

    def spread(self, n: int) -> NDArray[np.int64]:
        """``n`` window numbers, evenly spread; all windows if ``n`` is 0 or too large."""

    def describe(self) -> list[str]:
        """What the user should know of them, in a few lines."""


class TextWindows:
    """A shard as windows of ``context_length`` tokens, each with the token that follows it."""

    def __init__(
        self, shard: Shard | Shards, context_length: int, *, boundary: Boundary | None = None
    ) -> None:
        """With ``boundary``, attention stays inside documents."""
        if len(shard) <= context_length:
            raise UsageError(
                f"{shard.path} has {len(shard):,} tokens, and one window of model.context_length "
                f"{context_length} needs {context_length + 1:,}; use a longer text, a smaller "
                "model.context_length or another data.validation_fraction"
            )
        self.shard, self.context_length, self.boundary = shard, context_length, boundary

    def __len__(self) -> int:
        return (len(self.shard) - 1) // self.context_length

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """The batch of the windows with these numbers ``[B]``."""
        T = self.context_length
        rows = np.stack([self.shard.read(start, T + 1) for start in (windows * T).tolist()])
        both = torch.from_numpy(rows.astype(np.int64))
        tokens, targets = both[:, :-1], both[:, 1:]
        if self.boundary is None:
            return Batch(tokens, targets)
        is_end = tokens == self.boundary.end_of_text
        if self.boundary.begins:
            return Batch(tokens, targets, is_end.cumsum(1))
        return Batch(tokens, targets.masked_fill(is_end, IGNORED), is_end.cumsum(1) - is_end.long())

    def spread(self, n: int) -> NDArray[np.int64]:
        """``n`` window numbers, evenly spread over the shard; all windows if ``n`` is 0 or too
        large.
        """
        return spread(n, len(self))

    def describe(self) -> list[str]:
        """What the user should know of the windows: nothing here."""
        return []


def spread(n: int, total: int) -> NDArray[np.int64]:
    """``n`` numbers below ``total``, evenly spread; all if ``n`` is 0 or too large."""
    return np.arange(n) * total // n if 0 < n < total else np.arange(total)
