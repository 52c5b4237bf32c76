"""From logits to the next token: pure functions, in the order temperature, top-k, top-p, draw.

Logits are ``[..., V]``; a filter gives what it drops a logit of minus infinity.
"""

import torch
from torch import Tensor

from gpt.config import SamplingConfig


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the ``k`` likeliest tokens (and what ties with the last of them); 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities reach ``p``: the nucleus
    (arXiv:1904.09751).

    There is always at least one; of tokens that tie, the lower ids come first.
    """
    if p >= 1:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all the likelier tokens
    dropped = torch.empty_like(before, dtype=torch.bool).scatter_(-1, ids, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def next_token_probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The distribution that the next token is drawn from, ``[..., V]`` in float32; no greedy
    one.
    """
    scaled = logits.float() / config.temperature
    return keep_top_p(keep_top_k(scaled, config.top_k), config.top_p).softmax(dim=-1)


def choose(logits: Tensor, config: SamplingConfig, generator: torch.Generator | None) -> Tensor:
    """One token a row: ``[B, V]`` to ``[B]``. The likeliest at temperature 0, else drawn."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = next_token_probabilities(logits, config)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
