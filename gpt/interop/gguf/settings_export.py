"""Write a model's configuration as the metadata of a GGUF file.

An export reads the table of :mod:`gpt.interop.gguf.architectures` backward, and then forward again
(:func:`config_of`): what does not come back is what the architecture cannot express.
"""

import dataclasses
from typing import Any

import numpy as np

from gpt.config import ModelConfig, UsageError
from gpt.interop.families.family import UNUSED
from gpt.interop.gguf.architectures import ARCHITECTURES, ROPE_FACTORS, SIZES, Architecture
from gpt.interop.gguf.settings import PARALLEL, ROTATED, SCALING, config_of

_UNUSED = UNUSED | {"dropout"}
"""Fields that do not matter for a finished model."""


def metadata_of(name: str, config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model. ``UsageError`` names the settings that the architecture cannot
    express: those that :func:`config_of` does not read back.
    """
    arch, own = ARCHITECTURES[name], config.resolved()
    theirs: dict[str, Any] = {}
    for each, key in arch.keys.items():
        value = getattr(own, each)
        if value or key in SIZES.values():
            theirs[key] = value
    if not own.n_expert:
        theirs.pop("expert_used_count", None)
    if "window" in arch.keys and not own.window:
        theirs.pop("rope.freq_base_swa", None)
    if own.position == "rotary":
        theirs[ROTATED] = int(own.head_dim * own.rotary_fraction)
        if own.rotary_scaling in ("linear", "yarn"):
            theirs[SCALING + "type"] = own.rotary_scaling
            theirs[SCALING + "factor"] = own.rotary_scaling_factor
            theirs[SCALING + "original_context_length"] = own.rotary_trained_length
        if own.rotary_scaling == "yarn":
            theirs[SCALING + "yarn_beta_fast"] = own.rotary_high_frequency
            theirs[SCALING + "yarn_beta_slow"] = own.rotary_low_frequency
    if "head_dim" in arch.keys:
        theirs["attention.value_length"] = own.head_dim
    if name == "gptneox":
        theirs[PARALLEL] = own.norm_placement == "parallel"
    theirs["vocab_size"] = own.vocab_size
    metadata = {f"{name}.{key}": value for key, value in theirs.items()}
    shapes = _shapes_of(arch, own)
    try:
        read = config_of(name, metadata, shapes)
    except UsageError as error:
        raise UsageError(f"llama.cpp's {name} cannot express it: {error}") from None
    if read.rotary_scaling == "llama3":
        read = dataclasses.replace(read, rotary_scaling_factor=own.rotary_scaling_factor)
    if differ := _differing(own, read.resolved(), arch):
        each = " and ".join(f"model.{field} {getattr(config, field)}" for field in differ)
        raise UsageError(f"llama.cpp's {name} cannot express {each}")
    return metadata


def _shapes_of(arch: Architecture, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors from which :func:`config_of` reads settings."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, config.n_embd)}
    has = {
        "output.weight": not config.tie_embeddings,
        "blk.0.attn_output.bias": config.bias,
        "blk.0.attn_q.bias": config.qkv_bias == "yes",
        "blk.0.ffn_up.bias": config.mlp_bias == "yes",
        ROPE_FACTORS: config.rotary_scaling == "llama3",
    }
    return shapes | {name: (1,) for name, is_there in has.items() if is_there}


def _differing(own: ModelConfig, read: ModelConfig, arch: Architecture) -> list[str]:
    """The fields in which a model differs from what a file says. Biases that it lacks are zeros."""
    found = []
    for item in dataclasses.fields(ModelConfig):
        one, two = getattr(own, item.name), getattr(read, item.name)
        same = one == two
        if isinstance(item.default, float):
            same = np.float32(one) == np.float32(two)
        match item.name:
            case "window_pattern":
                same = own.layer_pattern() == read.layer_pattern()
            case "bias" | "qkv_bias" | "mlp_bias":
                same = same or (one in (False, "no") and bool(arch.bias))
            case "norm_bias":
                same = same or (one == "no" and own.norm_weight and bool(arch.bias))
            case "rotary_trained_length" | "rotary_high_frequency" | "rotary_temperature":
                same = same or own.rotary_scaling == "none"
            case "n_expert_active" | "moe_renormalise":
                same = same or not own.n_expert
            case "rotary_base" | "rotary_base_local" | "rotary_fraction":
                same = same or own.position not in ("rotary", "xpos")
        if not same and item.name not in _UNUSED:
            found.append(item.name)
    return found


def architecture_for(config: ModelConfig) -> str:
    """The first architecture that expresses a model. ``UsageError`` names what stands in the way of
    the nearest one: the last one with the most of its fixed settings.
    """
    problems: dict[str, str] = {}
    for name in ARCHITECTURES:
        try:
            metadata_of(name, config)
        except UsageError as error:
            problems[name] = str(error)
        else:
            return name
    fixed = {field for arch in ARCHITECTURES.values() for field in arch.fixed}
    plain = {item.name: item.default for item in dataclasses.fields(ModelConfig)}

    def distance(name: str) -> int:
        usual = plain | dict(ARCHITECTURES[name].fixed)
        return sum(getattr(config, field) != usual[field] for field in fixed)

    raise UsageError(problems[min(reversed(problems), key=distance)])


def expected(config: ModelConfig, arch: Architecture) -> ModelConfig:
    """The shape of the model in a file: with biases that a model may lack, which are then zeros."""
    if arch.bias:
        return dataclasses.replace(
            config, bias=True, norm_bias="auto", qkv_bias="auto", mlp_bias="auto"
        )
    return config
