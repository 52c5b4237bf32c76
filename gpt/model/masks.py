"""Attention masks as rules on positions.

A rule takes the positions of queries and keys, broadcast against each other, and says where a query
may look. The same rule serves dense masks here and ``flex_attention``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MaskRule = Callable[[Tensor, Tensor], Tensor]
"""``(query positions, key positions)`` to True where a query may look."""
ALIGNED = 16
"""The rows of a bias begin at multiples of this many numbers."""


def causal(query: Tensor, key: Tensor) -> Tensor:
    """A query sees its own position and the ones before it."""
    return key <= query


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the number that is added to the scores: 0 where it is True, minus infinity
    elsewhere.

    Attention would convert the mask in every layer. Rows begin at multiples of 16 numbers, because
    CUDA's memory-efficient kernel copies others, also in every layer.
    """
    n_key = mask.shape[-1]
    padded = F.pad(mask, (0, -n_key % ALIGNED))
    bias = torch.zeros(padded.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~padded, -torch.inf)[..., :n_key]


def dense(rule: MaskRule, at: Tensor, n_key: int, dtype: torch.dtype) -> Tensor:
    """The bias of queries at the positions ``at`` over keys 0 to ``n_key - 1``: ``[n, n_key]`` for
    ``at`` ``[n]``, ``[B, 1, n, n_key]`` (broadcast over heads) for ``[B, n]``.
    """
    keys = torch.arange(n_key, device=at.device)
    mask = rule(at[..., None], keys)
    return as_bias(mask if at.ndim == 1 else mask[:, None], dtype)
