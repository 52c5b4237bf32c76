"""Several documents in one row of tokens: attention stays inside each, and positions restart.

A row's documents are numbered, and each is contiguous. Attention is computed under a mask, or on a
CPU document by document: what the causal mask hides is then not computed at all.
"""

import torch
from torch import Tensor

SHORTEST = 64
"""Tokens. For documents that are shorter on average, one product under a mask is as fast
(benchmarks/RESULTS.md)."""


def positions(documents: Tensor) -> Tensor:
    """The position of each token in its document, from the documents' numbers, both ``[B, T]``."""
    at = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - torch.where(begins, at, 0).cummax(dim=1).values


def same_document(documents: Tensor) -> Tensor:
    """Where a query and a key are of one document, ``[B, T, T]``."""
    return documents[:, :, None] == documents[:, None, :]


def lengths(at: Tensor) -> list[int] | None:
    """The tokens of each document, row after row, for documents with the positions ``at``
    ``[B, T]``; ``None`` where attention document by document is not faster.
    """
    if at.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    begins = (at.flatten() == 0).nonzero().flatten()
    if at.numel() < SHORTEST * len(begins):
        return None
    ends = torch.cat([begins[1:], begins.new_tensor([at.numel()])])
    found: list[int] = (ends - begins).tolist()
    return found
