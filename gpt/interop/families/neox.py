"""GPT-NeoX, which is also Pythia: rotary positions in a part of each head, and attention and
feed-forward layer in parallel. A head's query, key and value are beside each other.

Reference: ``transformers``' ``GPTNeoXConfig`` and ``GPTNeoXForCausalLM``.
"""

from typing import Any

from gpt.config import ModelConfig
from gpt.interop.families.family import Family, Setting
from gpt.interop.families.fields import field
from gpt.interop.families.rope import rotary, rotary_of


class NeoX(Family):
    """The family ``gpt_neox``."""

    name = "GPT-NeoX"
    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    fixed = {"position": "rotary"}
    settings = {
        "vocab_size": Setting("vocab_size", 50432),
        "context_length": Setting("max_position_embeddings", 2048),
        "n_layer": Setting("num_hidden_layers", 44),
        "n_head": Setting("num_attention_heads", 64),
        "n_embd": Setting("hidden_size", 6144),
        "n_inner": Setting("intermediate_size", 24576),
        "norm_eps": Setting("layer_norm_eps", 1e-5),
        "activation": Setting("hidden_act", "gelu"),
        "tie_embeddings": Setting("tie_word_embeddings", False),
    }
    needs = {"attention_bias": True}
    dropouts = ("hidden_dropout", "attention_dropout")
    modules = {
        "embed": "embed_in",
        "norm": "final_layer_norm",
        "attn_norm": "input_layernorm",
        "attn.qkv": "attention.query_key_value",
        "attn.out": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    prefix = "gpt_neox."
    head = "embed_out.weight"
    renamed = ((r"^lm_head\.", "embed_out."),)
    qkv = "by_head"
    always_biased = True
    ignored = r"attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)"

    def others(self, theirs: dict[str, Any], fields: Any) -> dict[str, Any]:
        """The rotation, and whether the branches are parallel."""
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        found = rotary(theirs, fields, names=names, fraction=0.25)
        parallel = field(theirs, "use_parallel_residual", True, bool)
        return found | {"norm_placement": "parallel" if parallel else "pre"}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        found = rotary_of(config)
        return found | {
            "rotary_emb_base": found["rope_theta"],
            "rotary_pct": config.rotary_fraction,
            "use_parallel_residual": config.norm_placement == "parallel",
        }
