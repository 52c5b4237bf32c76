"""Reading tokens into a cache, with a limit on the memory of one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

PREFILL = 4096
"""Tokens in one forward pass. Longer texts go through in several chunks."""


def read(
    model: GPT,
    tokens: Tensor,
    cache: KVCache,
    *,
    valid: Sequence[int] | None = None,
    each: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """``model.features(tokens, cache=cache, valid=valid)``, in chunks of up to :data:`PREFILL`
    tokens over all rows of ``tokens`` ``[B, T]``. ``each`` is called with the features of each
    chunk ``[B, n, C]``, and the index of its first token.
    """
    rows, length = tokens.shape
    size = max(1, PREFILL // rows)
    features, part = [], None
    for at, chunk in zip(range(0, length, size), tokens.split(size, dim=1), strict=True):
        if valid is not None:
            part = [min(max(0, n - at), chunk.shape[1]) for n in valid]
        features.append(model.features(chunk, cache=cache, valid=part))
        if each is not None:
            each(at, features[-1])
    return torch.cat(features, dim=1)


@contextmanager
def evaluation_mode(model: GPT) -> Iterator[None]:
    """Put the model into evaluation mode, and afterwards back into its former mode."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
