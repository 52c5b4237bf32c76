"""Copying from the context: the pointer-sentinel mixture (Merity et al., 2016,
arXiv:1609.07843).
"""

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.cache import COPIED
from gpt.model.flops import flops_per_token
from gpt.model.initial import normal
from gpt.model.masks import causal
from gpt.model.shared import Shared


class Pointer(nn.Module):
    """Attention over the tokens of the context, and a sentinel whose weight is the vocabulary's:
    ``p(w) = g * p_vocabulary(w) + (sum of the weights of the tokens that are w)``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.vocab_size = config.n_embd, config.vocab_size
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.sentinel = nn.Parameter(torch.empty(config.n_embd))

    def flops_per_token(self, context_length: int) -> int:
        """Those of the query, and 6 for each number of each state that it is multiplied with."""
        return flops_per_token(self.query, context_length) + 6 * self.width * context_length

    @torch.no_grad()
    def reset(self) -> None:
        """N(0, 0.02), the sentinel too, and biases of zero."""
        normal(self.query)
        nn.init.normal_(self.sentinel, std=0.02)

    def forward(self, x: Tensor, tokens: Tensor, shared: Shared) -> Tensor:
        """Features ``[B, T, C]`` and their ``tokens`` ``[B, T]`` to ``[B, T, C + 1 + V]``: the
        features, the sentinel's weight ``g``, and what is copied of each token's probability.
        """
        query = self.query(x).tanh()
        states, seen, at, positions = x, tokens, shared.at, shared.at
        if shared.cache is not None and shared.plan is not None:
            slots = shared.plan.slots[COPIED]
            store = shared.cache.stores[COPIED]
            keys, ids = store.append(0, x[:, None], tokens[:, None, :, None], slots)
            states, seen, positions = keys[:, 0].to(x.dtype), ids[:, 0, :, 0], slots.keys
        exact = torch.promote_types(x.dtype, torch.float32)
        scores = (query @ states.transpose(1, 2)).to(exact)  # B, T, S
        visible = causal(at[..., :, None], positions[..., None, :])
        if shared.documents is not None:
            visible = visible & shared.documents.same()
        scores = scores.masked_fill(~visible, -torch.inf)
        sentinel = (query @ self.sentinel.to(query.dtype)).to(exact)[..., None]
        weights = torch.cat([scores, sentinel], dim=-1).softmax(dim=-1)
        copied = weights.new_zeros(*x.shape[:2], self.vocab_size)
        where = seen[:, None].expand(-1, x.shape[1], -1)
        copied = copied.scatter_add(-1, where, weights[..., :-1])
        return torch.cat([x.to(exact), weights[..., -1:], copied], dim=-1)

    def mix(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The mixture's log-probabilities, ``[..., V]``, of the vocabulary's ``logits`` and the
        ``weights`` ``[..., 1 + V]`` that :meth:`forward` gave.
        """
        exact = torch.promote_types(logits.dtype, torch.float32)
        gate, copied = weights.to(exact).split((1, self.vocab_size), dim=-1)
        mixed: Tensor = gate * logits.to(exact).softmax(dim=-1) + copied
        return mixed.clamp(min=1e-38).log()
