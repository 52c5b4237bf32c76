"""A model's configuration from the metadata of a GGUF file, and back.

:func:`config_of` reads the table of :mod:`gpt.interop.gguf.architectures` forward. An export reads
it backward (:func:`metadata_of`), and then forward again: what does not come back is what the
architecture cannot express.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import ModelConfig, UsageError, quoted
from gpt.interop.gguf.architectures import ARCHITECTURES, LAYER, ROPE_FACTORS, SIZES, Architecture
from gpt.model.rotary import frequencies

_SCALING = "rope.scaling."
_ROTATED = "rope.dimension_count"
_PARALLEL = "use_parallel_residual"
_PATTERN = "attention.sliding_window_pattern"
_KNOWN = {
    *("vocab_size", "attention.key_length", "attention.value_length", "attention.causal", _ROTATED),
    *("attention.max_alibi_bias", "tensor_data_layout", "pooling_type", f"{_SCALING}finetuned"),
    *(f"{_SCALING}{key}" for key in ("type", "factor", "original_context_length", "attn_factor")),
    *(f"{_SCALING}yarn_{key}" for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")),
}
"""Metadata of all architectures beside the table's: those that are read by the functions below, and
those that say nothing about the numbers.
"""
_LLAMA3: dict[str, Any] = {
    "rotary_low_frequency": 1.0,
    "rotary_high_frequency": 4.0,
    "rotary_trained_length": 8192,
}
"""What Llama 3.1 and 3.2 scale their rotary frequencies by; files have only the result."""
_UNUSED = {
    *("initial", "dropout", "moe_capacity", "moe_balance", "moe_balance_weight", "moe_z_weight"),
}
"""Fields that do not matter for a finished model."""


def config_of(
    name: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """The configuration of a model of the architecture ``name`` with tensors of these ``shapes``.

    ``UsageError`` for metadata that are missing, of the wrong type, or not supported.
    """
    arch, read = ARCHITECTURES[name], _Metadata(name, metadata)
    read.check(arch)
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise UsageError("it has no tensor token_embd.weight with two dimensions")
    fields: dict[str, Any] = dict(arch.fixed)
    defaults = {item.name: item.default for item in dataclasses.fields(ModelConfig)}
    for own, key in arch.keys.items():
        default = arch.defaults.get(own, defaults[own])
        needed = own in SIZES or own == "norm_eps"
        fields[own] = read.number(key, type(defaults[own]), None if needed else default)
    fields["vocab_size"] = read.number("vocab_size", int, embedding[0])
    fields["tie_embeddings"] = "output.weight" not in shapes
    has_bias = "blk.0.attn_output.bias" in shapes
    has_mlp_bias = any(f"blk.0.{each}.bias" in shapes for each in ("ffn_up", "ffn_down"))
    has_qkv_bias = "blk.0.attn_q.bias" in shapes if arch.qkv_bias is None else arch.qkv_bias
    fields["bias"] = has_bias if arch.bias is None else arch.bias
    fields["qkv_bias"] = "yes" if has_qkv_bias else "no"
    has_mlp_bias = has_mlp_bias if arch.bias is None else arch.bias
    fields["mlp_bias"] = "yes" if has_mlp_bias else "no"
    if name == "gptneox" and read.flag(_PARALLEL):
        fields["norm_placement"] = "parallel"
    if fields.get("n_expert"):
        if fields["n_expert_active"] < 2 or fields["bias"]:
            raise UsageError("experts must be at least two for each token, and without biases")
        fields["moe_renormalise"] = True
    _add_window(fields, read)
    width = fields.get("head_dim") or fields["n_embd"] // max(1, fields["n_head"])
    for key in ("attention.key_length", "attention.value_length"):
        if (found := read.number(key, int, width)) != width:
            raise UsageError(f"{name}.{key} is {found:,}, and must be {width:,}")
    heads_width = fields["n_embd"] // max(1, fields["n_head"])
    if name == "gemma3" and fields["n_layer"] == 62 and heads_width != width:  # the largest one
        fields["scale_attention_width"] = heads_width
    if fields.get("position") == "rotary":
        rotated = read.number(_ROTATED, int, width)
        if name == "gptneox":
            fields["rotary_fraction"] = rotated / max(1, width)
        elif rotated != width:
            raise UsageError(
                f"{name}.{_ROTATED} is {rotated}, and must be {width}, the width of a head"
            )
        _add_scaling(fields, read)
    config = ModelConfig(**fields)
    return _with_factors(config) if ROPE_FACTORS in shapes else config


class _Metadata:
    """The metadata of an architecture, with checks."""

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        mine = f"{name}."
        self.name = name
        self.theirs = {k.removeprefix(mine): v for k, v in metadata.items() if k.startswith(mine)}

    def check(self, arch: Architecture) -> None:
        """Refuse metadata that are not known, unless they are 0 or empty."""
        known = {*arch.keys.values(), *_KNOWN}
        known |= {_PARALLEL} if self.name == "gptneox" else set()
        known |= {_PATTERN} if "window" in arch.keys else set()
        for key, value in self.theirs.items():
            if key not in known and not (isinstance(value, int | float | str) and not value):
                raise UsageError(
                    f"it has the metadata {quoted(f'{self.name}.{key}')}, which is not supported"
                )
        if not self.theirs.get("attention.causal", True):
            raise UsageError(f"{self.name}.attention.causal is false, and must be true")

    def number(self, key: str, kind: type, default: Any) -> Any:
        """An integer, or a float as its shortest decimal; a ``default`` of ``None`` means that it
        is needed.
        """
        value = self.theirs.get(key, default)
        where = f"{self.name}.{key}"
        if value is None:
            raise UsageError(f"it lacks the metadata {where}")
        right = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, right):
            raise UsageError(f"{where} is {quoted(value)}, and must be a number")
        return value if kind is int else _shortest(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.theirs.get(key)
        if not isinstance(value, bool):
            raise UsageError(f"{self.name}.{key} is {quoted(value)}, and must be true or false")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that is this number in float32, as which files store it."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


def _add_window(fields: dict[str, Any], read: _Metadata) -> None:
    """Gemma's layers: all but each sixth have an attention window, and another rotary base."""
    if not fields.get("window"):
        for name in ("window", "rotary_base_local"):
            fields.pop(name, None)
        return
    every = read.number(_PATTERN, int, 6)
    if every < 1:
        raise UsageError(f"{read.name}.{_PATTERN} is {every}, and must be at least 1")
    if every > 1 and every <= fields["n_layer"]:
        fields["window_pattern"] = "L" * (every - 1) + "G"
    fields["rotary_base_local"] = fields["rotary_base_local"] or 10_000.0


def _add_scaling(fields: dict[str, Any], read: _Metadata) -> None:
    """How rotary positions are scaled."""
    key = _SCALING + "type"
    kind = read.theirs.get(key, "none")
    if kind not in ("none", "linear", "yarn"):
        raise UsageError(f"{read.name}.{key} is {quoted(kind)}, and must be none, linear or yarn")
    factor = read.number(_SCALING + "factor", float, 1.0)
    for other in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (found := read.number(_SCALING + other, float, 1.0)) != 1:
            raise UsageError(f"{read.name}.{_SCALING}{other} is {found}, and must be 1")
    if kind == "none" or factor in (0, 1):
        return
    if fields.get("window"):  # Gemma
        fields["rotary_scaling_local"] = False
    fields |= {"rotary_scaling": kind, "rotary_scaling_factor": factor}
    if kind == "yarn":
        fields |= {
            "rotary_trained_length": read.number(_SCALING + "original_context_length", int, 0),
            "rotary_high_frequency": read.number(_SCALING + "yarn_beta_fast", float, 0.0),
            "rotary_low_frequency": read.number(_SCALING + "yarn_beta_slow", float, 1.0),
        }


def _with_factors(config: ModelConfig) -> ModelConfig:
    """With Llama 3's scaling; :func:`check_factors` finds its factor."""
    if config.position != "rotary" or config.rotary_scaling != "none":
        raise UsageError(f"it has {ROPE_FACTORS}, which does not fit its other metadata")
    return dataclasses.replace(
        config, rotary_scaling="llama3", rotary_scaling_factor=8.0, **_LLAMA3
    )


def rope_factors(config: ModelConfig) -> Tensor:
    """By what Llama 3's scaling divides the frequency of each pair, ``[n]`` of float32."""
    config = config.resolved()
    unscaled = dataclasses.replace(config, rotary_scaling="none", rotary_scaling_factor=1.0)
    plain, _ = frequencies(unscaled, config.rotary_base)
    scaled, _ = frequencies(config, config.rotary_base)
    return plain / scaled


def check_factors(config: ModelConfig, found: Tensor) -> ModelConfig:
    """The configuration with the factor of Llama 3's scaling. ``UsageError`` if the file's factors
    ``found`` are not those of Llama 3.1 or 3.2.
    """
    factor = _shortest(found.max().item()) if len(found) else 0.0
    if not 1 < factor < math.inf:
        raise UsageError(f"{ROPE_FACTORS} has a factor of {factor}, and must have one above 1")
    config = dataclasses.replace(config, rotary_scaling_factor=factor)
    wanted = rope_factors(config)
    if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-3):
        raise UsageError(f"{ROPE_FACTORS} are not the factors of Llama 3.1 or 3.2")
    return config


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
        theirs[_ROTATED] = int(own.head_dim * own.rotary_fraction)
        if own.rotary_scaling in ("linear", "yarn"):
            theirs[_SCALING + "type"] = own.rotary_scaling
            theirs[_SCALING + "factor"] = own.rotary_scaling_factor
            theirs[_SCALING + "original_context_length"] = own.rotary_trained_length
        if own.rotary_scaling == "yarn":
            theirs[_SCALING + "yarn_beta_fast"] = own.rotary_high_frequency
            theirs[_SCALING + "yarn_beta_slow"] = own.rotary_low_frequency
    if "head_dim" in arch.keys:
        theirs["attention.value_length"] = own.head_dim
    if name == "gptneox":
        theirs[_PARALLEL] = own.norm_placement == "parallel"
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


def n_layers(tensors: Collection[str]) -> int:
    """How many layers a file has."""
    return len({match[1] for name in tensors if (match := LAYER.match(name))})
