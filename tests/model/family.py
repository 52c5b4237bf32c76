"""The variants of each part of a model, and covering sets of their combinations: every two values
of two parts that can meet do so in one of the models.
"""

from collections.abc import Callable
from typing import Any

from allpairspy import AllPairs

from gpt import kernels
from gpt.config import ModelConfig
from gpt.config.checks import UsageError

CONTEXT = 24
BASE: dict[str, Any] = {
    "vocab_size": 61, "context_length": CONTEXT, "n_layer": 3, "n_head": 4, "n_embd": 64,
    "n_inner": 96,
}  # fmt: skip
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "position": {
        "learned": {},
        "sinusoidal": {"position": "sinusoidal"},
        "rotary": {"position": "rotary"},
        "quarter rotary": {"position": "rotary", "rotary_fraction": 0.25},
        "linear": {
            "position": "rotary", "rotary_scaling": "linear", "rotary_scaling_factor": 2.0,
        },
        "ntk": {"position": "rotary", "rotary_scaling": "ntk", "rotary_scaling_factor": 2.0},
        "dynamic ntk": {
            "position": "rotary", "rotary_scaling": "dynamic_ntk", "rotary_trained_length": 12,
            "rotary_scaling_factor": 2.0,
        },
        "yarn": {"position": "rotary", "rotary_scaling": "yarn", "rotary_scaling_factor": 4.0},
        "llama3": {
            "position": "rotary", "rotary_scaling": "llama3", "rotary_scaling_factor": 8.0,
        },
        "xpos": {"position": "xpos"},
        "xpos yarn": {
            "position": "xpos", "rotary_scaling": "yarn", "rotary_scaling_factor": 4.0,
        },
        "alibi": {"position": "alibi"},
        "none": {"position": "none"},
    },
    "norm": {
        "layernorm": {},
        "rmsnorm": {"norm": "rmsnorm"},
        "rmsnorm with bias": {"norm": "rmsnorm", "norm_bias": "yes"},
        "layernorm without bias": {"norm_bias": "no"},
        "no weight": {"norm": "rmsnorm", "norm_weight": False},
        "layernorm without weight": {"norm_weight": False},
    },
    "placement": {
        name: {"norm_placement": name}
        for name in ("pre", "post", "deepnorm", "sandwich", "parallel", "parallel_shared")
    },
    "heads": {
        "multi-head": {},
        "grouped": {"n_kv_head": 2, "qk_norm": True},
        "multi-query": {"n_kv_head": 1, "qkv_bias": "no", "mlp_bias": "no"},
        "wide": {"head_dim": 32, "bias": False, "qkv_bias": "yes"},
    },
    "attention": {
        "all": {},
        "window": {"window": 5},
        "pattern": {"window": 6, "window_pattern": "LLG"},
        "two bases": {
            "window": 6, "window_pattern": "LG", "position": "rotary", "rotary_base_local": 100.0,
        },
        "scaled where global": {
            "window": 6, "window_pattern": "LG", "position": "rotary", "rotary_scaling": "linear",
            "rotary_scaling_factor": 4.0, "rotary_scaling_local": False,
        },
        "sinks": {"window": 5, "sinks": 2},
        "learned sinks": {"window": 7, "learned_sinks": True},
        "softcap": {
            "attention_softcap": 5.0, "logit_softcap": 7.0, "scale_attention_width": 20,
        },
        "three best": {"attention_top_k": 3},
        "sparse": {
            "window_pattern": "SG", "sparse_block": 3, "sparse_local": 2, "sparse_random": 1,
        },
    },
    "mlp": {
        "gelu": {},
        "relu squared": {"activation": "relu_squared"},
        "swiglu": {"mlp": "gated", "activation": "silu"},
        "geglu": {"mlp": "gated", "activation": "gelu"},
        "reglu": {"mlp": "gated", "activation": "relu"},
        "switch": {"n_expert": 3, "moe_balance": "switch", "activation": "tanh"},
        "mixtral": {
            "n_expert": 4, "n_expert_active": 2, "moe_renormalise": True, "mlp": "gated",
            "activation": "silu", "moe_balance": "mixtral", "moe_z_weight": 0.001,
        },
        "deepseek": {
            "n_expert": 4, "n_expert_active": 2, "moe_shared": 1, "moe_score": "sigmoid",
            "moe_renormalise": True, "moe_balance": "bias",
        },
    },
    "ends": {
        "tied": {},
        "untied": {"tie_embeddings": False, "initial": "depth"},
        "scaled": {"scale_embeddings": True, "initial": "zero"},
        "embedding norm": {"embedding_norm": True, "bias": False},
        "pointer": {"copy": "pointer"},
        "value embeddings": {
            "value_embeddings": 2, "logit_softcap": 7.0, "logit_softcap_form": "root",
        },
        "skips": {"skip_embedding": True, "skip_layers": True},
    },
}  # fmt: skip


def config_of(names: dict[str, str], **changes: Any) -> ModelConfig:
    """The model with these variants, by part."""
    fields = dict(BASE)
    for part, name in names.items():
        fields |= PARTS[part][name]
    return ModelConfig(**fields | changes)


def is_possible(values: list[str]) -> bool:
    """Whether the configuration takes the values of the first parts together."""
    try:
        config_of(dict(zip(PARTS, values, strict=False)))
    except UsageError:
        return False
    return True


def covering(is_wanted: Callable[[list[str]], bool]) -> list[dict[str, str]]:
    """Models in which every two values of two parts meet; ``is_wanted`` says of the first parts'
    values whether they may.
    """
    pairs = AllPairs([list(names) for names in PARTS.values()], filter_func=is_wanted)
    return [dict(zip(PARTS, values, strict=True)) for values in pairs]


def is_known(values: list[str]) -> bool:
    """Whether the kernels of whole blocks may take a model of these values."""
    return is_possible(values) and kernels.knows(config_of(dict(zip(PARTS, values, strict=False))))


def id_of(row: dict[str, str]) -> str:
    """The row as the name of a test."""
    return ", ".join(row.values())


ROWS = covering(is_possible)
KNOWN = covering(is_known)
"""Of those that the kernels take."""
