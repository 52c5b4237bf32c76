"""GPT-2. It stores the four matrices of a block transposed (``Conv1D``) and always has biases.

Reference: ``transformers``' ``GPT2Config`` and ``GPT2LMHeadModel``.
"""

from typing import Any

from gpt.config import ModelConfig, UsageError
from gpt.interop.families.family import Family, Setting


class GPT2(Family):
    """The family ``gpt2``."""

    name = "GPT-2"
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    settings = {
        "vocab_size": Setting("vocab_size", 50257),
        "context_length": Setting("n_positions", 1024, ("max_position_embeddings",)),
        "n_layer": Setting("n_layer", 12, ("num_hidden_layers",)),
        "n_head": Setting("n_head", 12, ("num_attention_heads",)),
        "n_embd": Setting("n_embd", 768, ("hidden_size",)),
        "n_inner": Setting("n_inner", 0),
        "norm_eps": Setting("layer_norm_epsilon", 1e-5),
        "activation": Setting("activation_function", "gelu_new"),
        "tie_embeddings": Setting("tie_word_embeddings", True),
        "scale_attention": Setting("scale_attn_weights", True),
        "scale_attention_by_layer": Setting("scale_attn_by_inverse_layer_idx", False),
    }
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    dropout = 0.1
    modules = {
        "embed": "wte",
        "position": "wpe",
        "norm": "ln_f",
        "attn_norm": "ln_1",
        "attn.qkv": "attn.c_attn",
        "attn.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    layers = "h"
    prefix = "transformer."
    is_turned = True
    qkv = "fused"
    always_biased = True
    ignored = r"attn\.bias|attn\.masked_bias"  # old files contain the causal mask

    def others(self, theirs: dict[str, Any], fields: Any) -> dict[str, Any]:
        """Refuses what is not decoder-only."""
        if theirs.get("add_cross_attention"):
            raise UsageError(
                "add_cross_attention is true, which a decoder-only model does not support"
            )
        return {}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The old name of the context, which llama.cpp reads; no inner width if it is the usual."""
        inner = None if config.n_inner == 4 * config.n_embd else config.n_inner
        return {"n_ctx": config.context_length, "n_inner": inner}
