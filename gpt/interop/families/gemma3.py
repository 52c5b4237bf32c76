"""Gemma 3, its text: Llama with norms before and after each branch, norms of queries and keys,
scaled embeddings, and attention windows in five of six layers, which have their own rotary base. A
norm's weight is stored minus 1.

Reference: ``transformers``' ``Gemma3TextConfig`` and ``Gemma3ForCausalLM``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from gpt.config import ModelConfig, UsageError, quoted
from gpt.interop.families.family import Setting
from gpt.interop.families.fields import field
from gpt.interop.families.llama import Llama, patterned
from gpt.interop.families.rope import rotary, rotary_of

_LOCAL_BASE = 10_000.0
_EVERY = 6


class Gemma3(Llama):
    """The family ``gemma3_text``."""

    name = "Gemma 3"
    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    fixed = {
        **Llama.fixed,
        "norm_placement": "sandwich",
        "qk_norm": True,
        "scale_embeddings": True,
    }
    settings = {
        **Llama.settings,
        "vocab_size": Setting("vocab_size", 262_208),
        "context_length": Setting("max_position_embeddings", 131_072),
        "n_layer": Setting("num_hidden_layers", 26),
        "n_head": Setting("num_attention_heads", 8),
        "n_kv_head": Setting("num_key_value_heads", 4),
        "head_dim": Setting("head_dim", 256),
        "n_embd": Setting("hidden_size", 2304),
        "n_inner": Setting("intermediate_size", 9216),
        "activation": Setting("hidden_activation", "gelu_pytorch_tanh"),
        "tie_embeddings": Setting("tie_word_embeddings", True),
        "logit_softcap": Setting("final_logit_softcapping", 0.0),
    }
    needs = {
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,  # transformers does not apply it
    }
    modules = {
        **Llama.modules,
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    added = 1.0

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The rotations, and the attention windows."""
        width = fields["head_dim"]
        scale = field(theirs, "query_pre_attn_scalar", 256, float)
        if scale != int(scale) or scale < 1:
            raise UsageError(
                f"query_pre_attn_scalar is {quoted(scale)}, and must be a whole number >= 1"
            )
        every = field(theirs, "sliding_window_pattern", _EVERY)
        if every < 1:
            raise UsageError(f"sliding_window_pattern is {every}, and must be at least 1")
        n_layer = min(fields["n_layer"], 10_000)
        pattern = "".join("G" if layer % every == every - 1 else "L" for layer in range(n_layer))
        found = patterned(theirs, field(theirs, "sliding_window", 4096), pattern)
        if found and theirs.get("sliding_window", 0) is None:
            raise UsageError(
                "sliding_window is null, and layers with sliding_attention need a whole number"
            )
        both = rotary(theirs, fields, base=1e6, kind="full_attention")
        if found:
            own = theirs if "rope_parameters" in theirs else {}
            local = rotary(own, fields, base=_LOCAL_BASE, kind="sliding_attention")
            base = field(theirs, "rope_local_base_freq", local.pop("rotary_base"), float)
            if "rotary_scaling" in local:
                raise UsageError("layers with sliding_attention cannot have another rope_type")
            found["rotary_base_local"] = base
            if "rotary_scaling" in both:
                found["rotary_scaling_local"] = False
        return both | found | {"scale_attention_width": 0 if scale == width else int(scale)}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        pattern = config.layer_pattern()
        types = {"L": "sliding_attention", "G": "full_attention"}
        return rotary_of(config) | {
            "query_pre_attn_scalar": config.scale_attention_width or 1,
            "rope_local_base_freq": config.rotary_base_local,
            "sliding_window": config.window or 4096,
            "layer_types": [types.get(letter, "full_attention") for letter in pattern],
            "final_logit_softcapping": config.logit_softcap or None,
        }


class Gemma3WithImages(Gemma3):
    """The text model of the family ``gemma3``, which also reads images."""

    model_type = "gemma3"
    prefix = "language_model.model."
    head = "language_model.lm_head.weight"
    renamed = (  # transformers 5 has these names in memory
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(?=vision_tower|multi_modal)", ""),
        (r"^lm_head\.", "language_model.lm_head."),
    )

    @property
    def buffers(self) -> re.Pattern[str]:
        """Also the tensors of the other parts."""
        return re.compile(r"(vision_tower|multi_modal_projector)\..*")

    def config(self, theirs: dict[str, Any], *, say: Callable[[str], None]) -> ModelConfig:
        """The configuration of the text model; ``say`` is told that the other parts are left
        out.
        """
        text = theirs.get("text_config")
        if not isinstance(text, dict):
            raise UsageError(f"text_config is {quoted(text)}, and must be an object")
        say("only the text model is loaded, without the part that reads images")
        return super().config(text, say=say)
