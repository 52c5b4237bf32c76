"""Causal self-attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762): projections and
the cache around :func:`gpt.model.attend.attend`.
"""

import functools

import torch
from torch import Tensor, nn

from gpt import training_kernels
from gpt.config import ModelConfig
from gpt.model.attend import attend
from gpt.model.documents import one_by_one
from gpt.model.flops import flops_per_token
from gpt.model.initial import Role, draw, normal, std_of, table
from gpt.model.kinds import layer_kinds
from gpt.model.norm import RMSNorm
from gpt.model.shared import Rotation, Shared
from gpt.training_kernels import takes


class CausalSelfAttention(nn.Module):
    """Heads that look at their own position and the ones before it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        config = config.resolved()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.layer, self.config = config.head_dim, layer, config
        self.kind = layer_kinds(config)[layer]
        self.softcap, self.top_k = config.attention_softcap, config.attention_top_k
        self.dropout = config.dropout
        self.scale = config.scale_attention_width**-0.5 if config.scale_attention else 1.0
        self.scale_tensor: Tensor | None = None
        if config.scale_attention_by_layer:
            self.scale /= layer + 1
            # On the CPU, where it mixes with tensors of any device, and in float64, exactly.
            self.scale_tensor = torch.tensor(self.scale, dtype=torch.float64, device="cpu")
        heads = config.n_head + 2 * config.n_kv_head
        has_bias = config.qkv_bias == "yes"
        self.qkv = nn.Linear(config.n_embd, heads * config.head_dim, bias=has_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        make_norm = functools.partial(RMSNorm, config, config.head_dim, can_have_bias=False)
        self.q_norm = make_norm() if config.qk_norm else None
        self.k_norm = make_norm() if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.learned_sinks else None
        values = torch.empty(config.vocab_size, config.n_kv_head * config.head_dim)
        self.values = table(values) if config.has_value_embedding(layer) else None

    @torch.no_grad()
    def reset(self) -> None:
        """As ``config.initial`` says (:mod:`gpt.model.initial`); norms are 1, and sinks 0."""
        widths = [n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        parts = self.qkv.weight.split(widths)
        roles: tuple[Role, ...] = ("scores", "scores", "value")
        stds = [
            std_of(part, role, self.config, self.layer)
            for part, role in zip(parts, roles, strict=True)
        ]
        normal(self.qkv, stds[0])
        if len(set(stds)) > 1:
            for part, std in zip(parts, stds, strict=True):
                nn.init.normal_(part, std=std)
        draw(self.out, "out", self.config, self.layer)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset()
        if self.sinks is not None:
            self.sinks.zero_()
        if self.values is not None:
            normal(self.values)

    def flops_per_token(self, context_length: int) -> int:
        """Those of the projections, and 12 for each number of each key: two products, forward and
        twice backward. Keys that the causal mask hides are counted too.
        """
        keys = min(self.kind.most_keys or context_length, context_length)
        spending = [child for child in self.children() if child is not self.values]
        projections = (flops_per_token(child, context_length) for child in spending)
        return sum(projections) + 12 * keys * self.n_head * self.head_dim

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``; with a cache, over the keys that it holds for this layer
        too.
        """
        B, T, _ = x.shape
        view, qkv, to_sinks = shared.views[self.kind], self.qkv(x), None
        if view.sinks is None and self._is_for_kernels(qkv, view.rotation):
            eps = None if self.q_norm is None else self.q_norm.eps
            turns = None if view.rotation is None else (view.rotation.cos, view.rotation.sin)
            q, k, v = training_kernels.split_heads(
                qkv, self.n_head, self.n_kv_head, eps=eps, turns=turns
            )
        else:
            heads = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)  # B, H + 2 Hkv, T, D
            q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if view.sinks is not None:
                to_sinks = view.sinks.rotation.query(q), view.sinks.keys
            if view.rotation is not None:
                q, k = view.rotation.query(q), view.rotation.key(k)
        if self.values is not None:
            own = self.values(shared.tokens).to(v.dtype).view(B, T, self.n_kv_head, self.head_dim)
            v = v + own.transpose(1, 2)
        if shared.cache is not None:
            assert shared.plan is not None
            k, v = shared.cache.append(self.layer, k, v, shared.plan)
        if self.scale_tensor is not None and torch.compiler.is_compiling():
            # A number of its own would make each block a graph of its own.
            q, scale = q * self.scale_tensor, 1.0
        else:
            scale = self.scale
        dropout = self.dropout if self.training else 0.0
        attended = functools.partial(
            attend,
            dropout=dropout,
            scale=scale,
            softcap=self.softcap,
            top_k=self.top_k,
            learned_sinks=self.sinks,
            training=self.training,
        )
        q = q.to(k.dtype)
        if view.dynamic is not None:
            y = view.dynamic(q, k, v, view.mask, attended)
        elif view.lengths is not None:
            y = one_by_one(
                q, k, v, lengths=view.lengths, mask=view.mask, to_sinks=to_sinks, attend=attended
            )
        else:
            y = attended(
                q, k, v, mask=view.mask, blocks=view.blocks, to_sinks=to_sinks, flex=view.flex
            )
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))
        return out

    def _is_for_kernels(self, qkv: Tensor, rotation: Rotation | None) -> bool:
        """Whether :func:`gpt.training_kernels.split_heads` has the arithmetic of this layer."""
        is_plain = self.q_norm is None or self.q_norm.weight is None
        return is_plain and (rotation is None or rotation.decay is None) and takes(qkv)
