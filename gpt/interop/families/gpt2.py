"""GPT-2. It stores the four matrices of a block transposed (``Conv1D``) and always has biases.

Reference: ``transformers``' ``GPT2Config`` and ``GPT2LMHeadModel``.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from gpt.config import ModelConfig, UsageError, quoted
from gpt.interop.families.family import Part
from gpt.interop.families.fields import ACTIVATION_NAMES, activation, check_not_quantised, field

_ALIASES = {  # names that GPT2Config accepts as well
    "n_positions": ("max_position_embeddings",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
}
_MODULES = {
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
_MATRICES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_EXPRESSED = {
    *("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "n_inner", "dropout", "bias"),
    *("tie_embeddings", "norm_eps", "activation", "scale_attention", "scale_attention_by_layer"),
    *("norm_bias", "qkv_bias"),
}
"""Fields that GPT-2 can express. It has the defaults of all others, except ``initial``, which does
not matter for a finished model.
"""


class GPT2:
    """GPT-2's :class:`gpt.interop.families.family.Family`."""

    name = "GPT-2"
    prefix = "transformer."
    layer = re.compile(r"h\.(\d+)\.")
    buffers = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # old files contain the causal mask

    def config(self, theirs: dict[str, Any], *, say: Callable[[str], None]) -> ModelConfig:
        """As the protocol. ``say`` is told if the dropouts differ."""

        def get(name: str, default: Any, kind: type | tuple[type, ...] = int) -> Any:
            return field(theirs, name, default, kind, aliases=_ALIASES.get(name, ()))

        check_not_quantised(theirs)
        if get("add_cross_attention", False, bool):
            raise UsageError(
                "add_cross_attention is true, which a decoder-only model does not support"
            )
        number = (int, float)
        activated = activation(theirs, "activation_function", "gelu_new")
        dropouts = {name: get(name, 0.1, number) for name in _DROPOUTS}
        if len(set(dropouts.values())) > 1:
            each = ", ".join(f"{name} {quoted(value)}" for name, value in dropouts.items())
            say(f"{each}: models here have only one dropout (used in training), set to resid_pdrop")
        vocab_size = get("vocab_size", 50257)
        if vocab_size == 0:
            raise UsageError("vocab_size is 0, and must be at least 1")
        return ModelConfig(
            vocab_size=vocab_size,
            context_length=get("n_positions", 1024),
            n_layer=get("n_layer", 12),
            n_head=get("n_head", 12),
            n_embd=get("n_embd", 768),
            n_inner=get("n_inner", 0),
            dropout=dropouts["resid_pdrop"],
            norm_eps=get("layer_norm_epsilon", 1e-5, number),
            activation=activated,
            tie_embeddings=get("tie_word_embeddings", True, bool),
            scale_attention=get("scale_attn_weights", True, bool),
            scale_attention_by_layer=get("scale_attn_by_inverse_layer_idx", False, bool),
        )

    def sizes(self, config: ModelConfig) -> list[tuple[str, str, list[int]]]:
        """As the protocol."""
        inner = config.resolved().n_inner
        return [
            ("wte.weight", "vocab_size and n_embd", [config.vocab_size, config.n_embd]),
            ("wpe.weight", "n_positions and n_embd", [config.context_length, config.n_embd]),
            ("h.0.mlp.c_fc.weight", "n_embd and n_inner", [config.n_embd, inner]),
        ]

    def parts(self, name: str, config: ModelConfig) -> list[Part]:
        """One tensor for each parameter."""
        if name == "head.weight":
            return [Part("lm_head.weight")]
        module, kind = name.rsplit(".", 1)
        layer = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            layer = f"h.{number}."
        turn = module in _MATRICES and kind == "weight"
        return [Part(f"{self.prefix}{layer}{_MODULES[module]}.{kind}", turn=turn)]

    def exported(self, config: ModelConfig) -> dict[str, Any]:
        """As the protocol."""
        usual = ModelConfig(**{name: getattr(config, name) for name in _EXPRESSED})
        resolved = usual.resolved()
        is_global = config.layer_pattern() == usual.layer_pattern()
        for name in [f.name for f in dataclasses.fields(config) if f.name != "initial"]:
            own = getattr(config, name)
            fits = own in (getattr(usual, name), getattr(resolved, name))
            if not (is_global if name == "window_pattern" else fits):
                raise UsageError(f"Hugging Face's GPT-2 cannot express model.{name} {own}")
        return dict.fromkeys(_DROPOUTS, config.dropout) | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
            "n_ctx": config.context_length,  # the old name, which llama.cpp reads
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.n_inner or None,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": ACTIVATION_NAMES[config.activation],
            "tie_word_embeddings": config.tie_embeddings,
            "scale_attn_weights": config.scale_attention,
            "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        }

    def stored(self, config: ModelConfig) -> ModelConfig:
        """With biases."""
        return dataclasses.replace(
            config, bias=True, norm_bias="auto", qkv_bias="auto", window_pattern="", initial="auto"
        )
