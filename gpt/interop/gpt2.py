"""GPT-2 as Hugging Face names it: the configuration and the tensors, both ways.

The tensors differ in name, and the four matrices of a block are stored transposed (``Conv1D``).
Reference: ``transformers``' ``GPT2Config`` and ``GPT2LMHeadModel``.
"""

import re
from typing import Any

from gpt.config import Activation, ModelConfig, UsageError

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_ACTIVATION_NAMES: dict[Activation, str] = {
    "gelu_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
_ALIASES = {  # which GPT2Config takes as well
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
_MATRIX = re.compile(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight")
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def model_config(theirs: dict[str, Any]) -> ModelConfig:
    """The ``ModelConfig`` of a ``config.json``; ``UsageError`` names a field that is not
    supported.
    """

    def get(name: str, default: Any, kind: type | tuple[type, ...] = int) -> Any:
        given = {key: theirs[key] for key in (name, *_ALIASES.get(name, ())) if key in theirs}
        given = {key: value for key, value in given.items() if value is not None}
        for value in given.values():
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not right or value != next(iter(given.values())):
                names = " and ".join(given)
                raise UsageError(f"{names} is {value!r}, and must be like {default!r}")
        return next(iter(given.values()), default)

    if theirs.get("model_type") != "gpt2":
        raise UsageError(f"model_type is {theirs.get('model_type')!r}, and must be 'gpt2'")
    if theirs.get("quantization_config") is not None:
        raise UsageError("quantization_config is given, and quantised weights are not supported")
    if get("add_cross_attention", False, bool):
        raise UsageError("add_cross_attention is true, and a model with a decoder alone has none")
    number = (int, float)
    activation = get("activation_function", "gelu_new", str)
    if activation not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise UsageError(f"activation_function is {activation!r}, and must be one of {names}")
    dropouts = {get(f"{place}_pdrop", 0.1, number) for place in ("resid", "embd", "attn")}
    if len(dropouts) > 1:
        raise UsageError(
            f"resid_pdrop, embd_pdrop and attn_pdrop are {sorted(dropouts)}, and must be one number"
        )
    return ModelConfig(
        vocab_size=get("vocab_size", 50257),
        context_length=get("n_positions", 1024),
        n_layer=get("n_layer", 12),
        n_head=get("n_head", 12),
        n_embd=get("n_embd", 768),
        n_inner=get("n_inner", 0),
        dropout=dropouts.pop(),
        norm_eps=get("layer_norm_epsilon", 1e-5, number),
        activation=_ACTIVATIONS[activation],
        tie_embeddings=get("tie_word_embeddings", True, bool),
        scale_attention=get("scale_attn_weights", True, bool),
        scale_attention_by_layer=get("scale_attn_by_inverse_layer_idx", False, bool),
    )


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model; ``UsageError`` names what GPT-2 cannot express."""
    wrong = []
    if config.resolved().n_kv_head != config.n_head:
        wrong.append(f"model.n_kv_head {config.n_kv_head}")
    if not config.bias:
        wrong.append("model.bias false")
    if wrong:
        raise UsageError(f"GPT-2 in Hugging Face's form cannot express {', '.join(wrong)}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # the same, for what reads the old name (llama.cpp)
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner or None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.scale_attention,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
    }


def hugging_face_name(name: str) -> str:
    """Their name of this project's parameter ``name``, without the prefix ``transformer.``."""
    if name == "head.weight":
        return "lm_head.weight"
    module, kind = name.rsplit(".", 1)
    if module.startswith("blocks."):
        _, layer, part = module.split(".", 2)
        return f"h.{layer}.{_MODULES[part]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def is_transposed(name: str) -> bool:
    """Whether they store this project's parameter ``name`` transposed."""
    return _MATRIX.fullmatch(name) is not None


def is_buffer(name: str) -> bool:
    """Whether their tensor ``name`` (without the prefix) is the causal mask that old files
    carry.
    """
    return _BUFFER.fullmatch(name) is not None
