"""Llama, and the families that are Llama with a few switches: Mistral, Mixtral, Qwen 2 and 3.

Reference: ``transformers``' ``LlamaConfig`` and ``LlamaForCausalLM``, and those of the others.
"""

from collections.abc import Mapping
from typing import Any

from gpt.config import ModelConfig, UsageError, quoted
from gpt.interop.families.family import Family, Setting
from gpt.interop.families.fields import field
from gpt.interop.families.rope import rotary, rotary_of


class Llama(Family):
    """The family ``llama`` (1 to 3)."""

    name = "Llama"
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    fixed = {
        "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "bias": False,
    }  # fmt: skip
    settings = {
        "vocab_size": Setting("vocab_size", 32000),
        "context_length": Setting("max_position_embeddings", 2048),
        "n_layer": Setting("num_hidden_layers", 32),
        "n_head": Setting("num_attention_heads", 32),
        "n_kv_head": Setting("num_key_value_heads", 0),
        "head_dim": Setting("head_dim", 0),
        "n_embd": Setting("hidden_size", 4096),
        "n_inner": Setting("intermediate_size", 11008),
        "norm_eps": Setting("rms_norm_eps", 1e-6),
        "activation": Setting("hidden_act", "silu"),
        "tie_embeddings": Setting("tie_word_embeddings", False),
    }
    dropouts = ("attention_dropout",)
    modules = {
        "embed": "embed_tokens",
        "norm": "norm",
        "attn_norm": "input_layernorm",
        "attn.qkv": "self_attn.{}_proj",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "attn.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "mlp.router": "mlp.gate",
        "mlp.experts.gate": "mlp.experts.{}.gate_proj",
        "mlp.experts.up": "mlp.experts.{}.up_proj",
        "mlp.experts.down": "mlp.experts.{}.down_proj",
    }

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The rotation and the biases."""
        has = {name: field(theirs, name, False, bool) for name in ("attention_bias", "mlp_bias")}
        mlp = "yes" if has["mlp_bias"] else "no"
        return rotary(theirs, fields) | {"bias": has["attention_bias"], "mlp_bias": mlp}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        biases = {"attention_bias": config.bias, "mlp_bias": config.mlp_bias == "yes"}
        return rotary_of(config) | biases


class Mistral(Llama):
    """Llama with an attention window in every layer, if ``sliding_window`` is a number."""

    name = "Mistral"
    model_type = "mistral"
    architecture = "MistralForCausalLM"
    settings = {
        **Llama.settings,
        "context_length": Setting("max_position_embeddings", 4096 * 32),
        "n_kv_head": Setting("num_key_value_heads", 8, null=0),
        "n_inner": Setting("intermediate_size", 14336),
    }
    window = 4096
    """Their default."""

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The rotation and the attention window, which ``null`` turns off."""
        given = {"sliding_window": self.window} | theirs
        return rotary(theirs, fields) | {"window": field(given, "sliding_window", 0)}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        return rotary_of(config) | {"sliding_window": config.window or None}


class Mixtral(Mistral):
    """Mistral with experts, whose weights are renormalised."""

    name = "Mixtral"
    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    fixed = {**Llama.fixed, "moe_renormalise": True}
    settings = {
        **Mistral.settings,
        "norm_eps": Setting("rms_norm_eps", 1e-5),
        "n_expert": Setting("num_local_experts", 8, ("num_experts",)),
        "n_expert_active": Setting("num_experts_per_tok", 2),
    }
    modules = {
        **Llama.modules,
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.gate": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.up": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.down": "block_sparse_moe.experts.{}.w2",
    }
    renamed = ((r"(layers\.\d+)\.mlp\.", r"\1.block_sparse_moe."),)
    window = 0

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """As Mistral's."""
        base = field(theirs, "rope_theta", 1e6, float)
        return super().others({"rope_theta": base} | theirs, fields)


class Qwen2(Llama):
    """Llama with biases of queries, keys and values, and attention windows in the last layers."""

    name = "Qwen 2"
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    fixed = {**Llama.fixed, "qkv_bias": "yes"}
    settings = {
        **{name: each for name, each in Llama.settings.items() if name != "head_dim"},
        "vocab_size": Setting("vocab_size", 151936),
        "context_length": Setting("max_position_embeddings", 32768),
        "n_kv_head": Setting("num_key_value_heads", 32, null=0),
        "n_inner": Setting("intermediate_size", 22016),
    }

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The rotation and the attention windows."""
        return rotary(theirs, fields) | windows(theirs, fields)

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        return rotary_of(config) | windows_of(config)


class Qwen3(Qwen2):
    """Qwen 2 with a norm of queries and keys in the place of their biases."""

    name = "Qwen 3"
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    fixed = {**Llama.fixed, "qk_norm": True}
    settings = {**Qwen2.settings, "head_dim": Setting("head_dim", 128)}
    needs = {"attention_bias": False}


class Qwen3MoE(Qwen3):
    """Qwen 3 with experts in every layer."""

    name = "Qwen 3 MoE"
    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    settings = {
        **Qwen3.settings,
        "n_kv_head": Setting("num_key_value_heads", 4, null=0),
        "head_dim": Setting("head_dim", 0),
        "n_embd": Setting("hidden_size", 2048),
        "n_layer": Setting("num_hidden_layers", 24),
        "n_inner": Setting("moe_intermediate_size", 768),
        "n_expert": Setting("num_experts", 128, ("num_local_experts",)),
        "n_expert_active": Setting("num_experts_per_tok", 8),
        "moe_renormalise": Setting("norm_topk_prob", False),
    }
    needs = {**Qwen3.needs, "decoder_sparse_step": 1, "mlp_only_layers": []}

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The rotation, and the attention window of all layers."""
        found = rotary(theirs, fields)
        if not has_windows(theirs):
            return found
        return found | {"window": field(theirs, "sliding_window", 4096)}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        window = {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}
        return rotary_of(config) | window


def has_windows(theirs: dict[str, Any]) -> bool:
    """Whether attention windows are used, and are not null."""
    used: bool = field(theirs, "use_sliding_window", False, bool)
    return used and theirs.get("sliding_window", 0) is not None


def windows(theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Attention windows by ``layer_types``; in older files they are in all layers from
    ``max_window_layers`` on, if ``use_sliding_window`` is true.
    """
    n = fields["n_layer"]
    if not has_windows(theirs):
        return {}
    window = field(theirs, "sliding_window", 4096)
    first = field(theirs, "max_window_layers", 28)
    pattern = "".join("L" if layer >= first else "G" for layer in range(min(n, 10_000)))
    return patterned(theirs, window, pattern)


def patterned(theirs: dict[str, Any], window: int, pattern: str) -> dict[str, Any]:
    """An attention window in the layers of a ``pattern``, which ``layer_types`` replaces."""
    letters = {"sliding_attention": "L", "full_attention": "G"}
    types = theirs.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or not set(map(str, types)) <= letters.keys():
            known = " and ".join(letters)
            raise UsageError(f"layer_types is {quoted(types)}, and must be a list of {known}")
        if len(types) != len(pattern):
            raise UsageError(
                f"layer_types has {len(types):,} layers, and the model has {len(pattern):,}"
            )
        pattern = "".join(letters[each] for each in types)
    return {"window": window, "window_pattern": pattern} if "L" in pattern else {}


def windows_of(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`windows`, with the names that all versions read where those suffice."""
    pattern = config.layer_pattern()
    types = {"L": "sliding_attention", "G": "full_attention"}
    if "L" not in pattern or not set(pattern) <= types.keys():
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": config.window,
        "max_window_layers": pattern.index("L"),
        "layer_types": [types[letter] for letter in pattern],
    }
