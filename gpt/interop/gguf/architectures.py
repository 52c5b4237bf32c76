"""The architectures of llama.cpp that are read and written here, as tables.

GGUF names tensors alike in all architectures, as this project does, and keeps the rows of queries,
keys and values one after the other. So there is one table of names (:data:`TENSORS`). An
architecture says which settings all its models have, which metadata hold the others, and how its
queries and keys are stored. :mod:`gpt.interop.gguf.settings` reads this table forward to load a
model, and backward to export one.

Reference: llama.cpp's ``src/models/*.cpp`` and its converter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gpt.config import ModelConfig

TENSORS = {
    "embed": "token_embd",
    "position": "position_embd",
    "embed_norm": "token_embd_norm",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "attn.qkv": "attn_qkv",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.out": "attn_output",
    "attn_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.gate": "ffn_gate",
    "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.up": "ffn_up_exps",
    "mlp.experts.gate": "ffn_gate_exps",
    "mlp.experts.down": "ffn_down_exps",
    "mlp_out_norm": "post_ffw_norm",
}
"""This project's modules, and llama.cpp's. Those of a block have ``blocks.N.`` or ``blk.N.`` before
them. The experts of a layer are one tensor.
"""
ROPE_FACTORS = "rope_freqs.weight"
"""A tensor of Llama 3.1: by what the frequency of each rotary pair is divided."""
LAYER = re.compile(r"blk\.(\d{1,9})\.")

SIZES = {
    "context_length": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
}
_HEADS = {"n_kv_head": "attention.head_count_kv"}
_ROTARY = {"rotary_base": "rope.freq_base"}
_WIDTH = {"head_dim": "attention.key_length"}
_EXPERTS = {"n_expert": "expert_count", "n_expert_active": "expert_used_count"}
_LAYERNORM = {"norm_eps": "attention.layer_norm_epsilon"}
_RMSNORM = {"norm_eps": "attention.layer_norm_rms_epsilon"}
_GATED = {"position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu"}


@dataclass(frozen=True)
class Architecture:
    """One ``general.architecture``."""

    fixed: Mapping[str, Any]
    """Fields of :class:`ModelConfig` that all its models have, beside the defaults."""
    keys: Mapping[str, str]
    """Other fields, and the metadata that hold them (after the architecture's name)."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Of fields that a file may lack."""
    is_fused: bool = False
    """Whether queries, keys and values are one tensor."""
    is_interleaved: bool = False
    """Whether the two numbers of a rotary pair are neighbours. Here they are half a head apart."""
    bias: bool | None = False
    """Whether linear layers, and norms with a mean, have biases; ``None``: if the file has them."""
    qkv_bias: bool | None = False
    """The same for queries, keys and values."""


ARCHITECTURES = {
    "gpt2": Architecture({}, SIZES | _HEADS | _LAYERNORM, is_fused=True, bias=True, qkv_bias=True),
    "bloom": Architecture(
        {"position": "alibi", "embedding_norm": True},
        SIZES | _HEADS | _LAYERNORM,
        is_fused=True,
        bias=True,
        qkv_bias=True,
    ),
    "gptneox": Architecture(  # llama.cpp computes the models' gelu by gelu_tanh
        {"position": "rotary", "activation": "gelu"},
        SIZES | _HEADS | _LAYERNORM | _ROTARY,
        is_fused=True,
        bias=True,
        qkv_bias=True,
    ),
    "qwen2": Architecture(_GATED, SIZES | _HEADS | _RMSNORM | _ROTARY, qkv_bias=True),
    "qwen3": Architecture(_GATED | {"qk_norm": True}, SIZES | _HEADS | _WIDTH | _RMSNORM | _ROTARY),
    "llama": Architecture(
        _GATED,
        SIZES | _HEADS | _WIDTH | _RMSNORM | _ROTARY | _EXPERTS,
        is_interleaved=True,
        bias=None,
        qkv_bias=None,
    ),
    "gemma3": Architecture(
        _GATED
        | {
            "activation": "gelu_tanh",
            "norm_placement": "sandwich",
            "qk_norm": True,
            "scale_embeddings": True,
        },
        SIZES
        | _HEADS
        | _WIDTH
        | _RMSNORM
        | _ROTARY
        | {
            "rotary_base_local": "rope.freq_base_swa",
            "window": "attention.sliding_window",
            "logit_softcap": "final_logit_softcapping",
        },
        {"rotary_base": 1_000_000.0},
    ),
}
"""The architectures by name, the narrowest first: an export takes the first that fits."""


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of the file, which are rows of a parameter."""

    tensor: str
    start: int
    stop: int
    heads: int = 0
    """If it is not 0: so many heads, in which the numbers of a rotary pair are neighbours."""

    def order(self) -> Tensor | None:
        """For each row of the parameter, which of these rows it is; ``None`` if they are in order.
        The order of :meth:`inverse` is for the other direction.
        """
        if not self.heads:
            return None
        pairs = torch.arange(self.stop - self.start).view(self.heads, -1, 2)
        return pairs.transpose(1, 2).flatten()

    def inverse(self) -> Tensor | None:
        """For each of these rows, which row of the parameter it is."""
        order = self.order()
        return None if order is None else order.argsort()


def parts(name: str, config: ModelConfig, arch: Architecture) -> list[Rows]:
    """The tensors that hold this project's parameter ``name``. The parameter's rows are the rows of
    the parts, in order. ``config`` is resolved.
    """
    module, kind = name.rsplit(".", 1)
    layer = ""
    if module.startswith("blocks."):
        _, number, module = module.split(".", 2)
        layer = f"blk.{number}."
    D, H, G = config.head_dim, config.n_head, config.n_kv_head
    if module == "attn.qkv" and not arch.is_fused:
        heads = [(each, each * arch.is_interleaved) for each in (H, G)] + [(G, 0)]
        return [
            Rows(f"{layer}attn_{each}.{kind}", 0, n * D, pairs)
            for each, (n, pairs) in zip("qkv", heads, strict=True)
        ]
    if match := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", module):
        expert, module = int(match[1]), f"mlp.experts.{match[2]}"
        n = config.n_embd if match[2] == "down" else config.n_inner
        return [Rows(f"{layer}{TENSORS[module]}.{kind}", expert * n, (expert + 1) * n)]
    sizes = {
        "embed": config.vocab_size,
        "head": config.vocab_size,
        "position": config.context_length,
        "attn.qkv": (H + 2 * G) * D,
        "attn.q_norm": D,
        "attn.k_norm": D,
        "mlp.up": config.n_inner,
        "mlp.gate": config.n_inner,
        "mlp.router": config.n_expert,
    }
    return [Rows(f"{layer}{TENSORS[module]}.{kind}", 0, sizes.get(module, config.n_embd))]
