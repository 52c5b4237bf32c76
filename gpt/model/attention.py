"""Causal self-attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762): projections and
the cache around :func:`gpt.model.attend.attend`.
"""

import math

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.attend import attend
from gpt.model.initial import STD, normal
from gpt.model.shared import Shared


class CausalSelfAttention(nn.Module):
    """Heads that look at their own position and the ones before it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        config = config.resolved()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.layer = config.head_dim, layer
        self.dropout = config.dropout
        self.scale = config.head_dim**-0.5 if config.scale_attention else 1.0
        self.scale_tensor: Tensor | None = None
        if config.scale_attention_by_layer:
            self.scale /= layer + 1
            # Of no device, as a number is, and of the exact type.
            self.scale_tensor = torch.tensor(self.scale, dtype=torch.float64, device="cpu")
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.residual_std = STD / math.sqrt(2 * config.n_layer)

    def reset(self) -> None:
        """N(0, 0.02). What is added to the residual stream is scaled by ``1 / sqrt(2 n_layer)``, so
        that the stream's variance does not grow with the number of branches (GPT-2).
        """
        normal(self.qkv)
        normal(self.out, self.residual_std)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``; with a cache, over the keys that it holds for this layer
        too.
        """
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # B, H + 2 Hkv, T, D
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if shared.rotation is not None:
            q, k = shared.rotation.turn(q), shared.rotation.turn(k)
        if shared.cache is not None:
            assert shared.slots is not None
            k, v = shared.cache.append(self.layer, k, v, shared.slots)
        if self.scale_tensor is not None and torch.compiler.is_compiling():
            # A number of its own would make each block a graph of its own.
            q, scale = q * self.scale_tensor, 1.0
        else:
            scale = self.scale
        dropout = self.dropout if self.training else 0.0
        y = attend(
            q.to(k.dtype),
            k,
            v,
            mask=shared.mask,
            dropout=dropout,
            scale=scale,
            training=self.training,
        )
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))
        return out
