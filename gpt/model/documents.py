"""Rows that hold several documents: positions restart with each, and attention stays inside.

The result is that of each document alone. Two ways to compute it: a mask of all queries by all
keys, or one document after the other. On a CPU the second takes less time, because it skips what
the mask hides, unless the documents are only a few tokens long (benchmarks/RESULTS.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_A_DOCUMENT = 1 << 15
"""Computing a document's attention alone costs as much time as this many masked scores."""
MULTIPLE, SHORT_MULTIPLE = 32, 8
"""A document is padded with zeros to a multiple of so many tokens (the second, if it is shorter
than the first). Causal attention does not see them. oneDNN compiles a product for each shape, and
keeps it: hundreds of megabytes, if each length has its own."""


@dataclass(frozen=True)
class Documents:
    """Which document each token belongs to."""

    number: Tensor
    """The document's number in its row, from 0, ``[B, T]``."""
    at: Tensor
    """The token's position in its document, ``[B, T]``."""
    lengths: Tensor | None = None
    """The lengths of all documents, row after row, where attention is computed one by one."""
    longest: int = 0
    """The padded length of the longest document, where :attr:`lengths` are given."""

    def same(self) -> Tensor:
        """Whether query and key belong to the same document, ``[B, T, T]``."""
        return self.number[:, :, None] == self.number[:, None, :]


def documents_of(marks: Tensor, n_head: int) -> Documents | None:
    """The documents of ``marks`` ``[B, T]``: neighbours with equal marks belong to the same one.
    ``None`` where, on a CPU, each row is one document.
    """
    B, T = marks.shape
    starts = torch.ones_like(marks, dtype=torch.bool)
    starts[:, 1:] = marks[:, 1:] != marks[:, :-1]
    index = torch.arange(T, device=marks.device)
    number = starts.cumsum(1) - 1
    at = index - torch.where(starts, index, 0).cummax(1).values
    if marks.device.type != "cpu":  # no wait for the device
        return Documents(number, at)
    ends = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([B * T])])
    lengths = ends.diff()
    if len(lengths) == B:
        return None
    if len(lengths) * SCORES_A_DOCUMENT > B * n_head * T * T:
        return Documents(number, at)
    return Documents(number, at, lengths, min(T, _up(int(lengths.max()))))


def _up(n: int) -> int:
    """The padded length of a document of ``n`` tokens."""
    return n + -n % (MULTIPLE if n > MULTIPLE else SHORT_MULTIPLE)


def one_by_one(*tensors: Tensor, **options: Any) -> Tensor:
    """Attention inside each document, as :func:`_one_by_one`. It is never compiled, because the
    number of documents differs from step to step.
    """
    if torch.compiler.is_compiling():
        return _uncompiled()(*tensors, **options)
    return _one_by_one(*tensors, **options)


@functools.cache
def _uncompiled() -> Callable[..., Tensor]:
    uncompiled: Callable[..., Tensor] = torch.compiler.disable(_one_by_one)  # imports the compiler
    return uncompiled


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    mask: Tensor | None,
    to_sinks: tuple[Tensor, Tensor] | None,
    attend: Callable[..., Tensor],
) -> Tensor:
    """Attention by ``attend`` (:func:`gpt.model.attend.attend`) inside each document. ``mask`` and
    the keys of ``to_sinks`` are those of the longest document, with the zeros behind it.
    """
    T, sizes = q.shape[2], lengths.tolist()
    others = [None] * len(sizes) if to_sinks is None else _split(to_sinks[0], sizes)
    parts = []
    for n, *heads, other in zip(sizes, *(_split(x, sizes) for x in (q, k, v)), others, strict=True):
        wide = min(T, _up(n))
        seen = None if mask is None else mask[..., :wide, :wide]
        sinks = None
        if to_sinks is not None and other is not None:
            sinks = _padded(other, wide), to_sinks[1][..., :wide]
        part = attend(*(_padded(x, wide) for x in heads), mask=seen, to_sinks=sinks)
        parts.append(part[:, :, :n].transpose(1, 2))
    B, H = q.shape[:2]
    return torch.cat(parts, dim=1).view(B, T, H, -1).transpose(1, 2)


def _split(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """``[B, H, T, D]`` document by document, each ``[1, H, n, D]``."""
    rows = x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)
    return torch.split(rows, sizes, dim=2)


def _padded(x: Tensor, n: int) -> Tensor:
    """``[1, H, T, D]`` with zeros behind it, ``[1, H, n, D]``."""
    return x if x.shape[2] == n else F.pad(x, (0, 0, 0, n - x.shape[2]))
