"""BLOOM: ALiBi, and a norm after the embedding. A head's query, key and value are beside each
other.

Reference: ``transformers``' ``BloomConfig`` and ``BloomForCausalLM``.
"""

from gpt.interop.families.family import Family, Setting


class Bloom(Family):
    """The family ``bloom``."""

    name = "BLOOM"
    model_type = "bloom"
    architecture = "BloomForCausalLM"
    fixed = {"position": "alibi", "embedding_norm": True}
    settings = {
        "vocab_size": Setting("vocab_size", 250880),
        "context_length": Setting("seq_length", 2048),
        "n_layer": Setting("n_layer", 2, ("num_hidden_layers",)),
        "n_head": Setting("n_head", 8, ("num_attention_heads",)),
        "n_embd": Setting("hidden_size", 64, ("n_embed",)),
        "norm_eps": Setting("layer_norm_epsilon", 1e-5),
        "tie_embeddings": Setting("tie_word_embeddings", True),
    }
    needs = {"apply_residual_connection_post_layernorm": False}
    dropouts = ("hidden_dropout", "attention_dropout")
    modules = {
        "embed": "word_embeddings",
        "embed_norm": "word_embeddings_layernorm",
        "norm": "ln_f",
        "attn_norm": "input_layernorm",
        "attn.qkv": "self_attention.query_key_value",
        "attn.out": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    layers = "h"
    prefix = "transformer."
    qkv = "by_head"
    always_biased = True
