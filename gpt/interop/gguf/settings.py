"""Read a model's configuration from the metadata of a GGUF file, by the table of
:mod:`gpt.interop.gguf.architectures`.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import ModelConfig, UsageError, quoted
from gpt.interop.gguf.architectures import ARCHITECTURES, LAYER, ROPE_FACTORS, SIZES, Architecture
from gpt.model.rotary import frequencies

SCALING = "rope.scaling."
ROTATED = "rope.dimension_count"
PARALLEL = "use_parallel_residual"
_PATTERN = "attention.sliding_window_pattern"
_KNOWN = {
    *("vocab_size", "attention.key_length", "attention.value_length", "attention.causal", ROTATED),
    *("attention.max_alibi_bias", "tensor_data_layout", "pooling_type", f"{SCALING}finetuned"),
    *(f"{SCALING}{key}" for key in ("type", "factor", "original_context_length", "attn_factor")),
    *(f"{SCALING}yarn_{key}" for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")),
}
"""Metadata of all architectures beside the table's: those that are read by the functions below, and
those that say nothing about the numbers.
"""
_NAMES = {
    "head_dim": "attention.key_length",
    "rotary_fraction": ROTATED,
    "rotary_scaling": f"{SCALING}type",
    "rotary_scaling_factor": f"{SCALING}factor",
    "rotary_trained_length": f"{SCALING}original_context_length",
    "rotary_high_frequency": f"{SCALING}yarn_beta_fast",
    "rotary_low_frequency": f"{SCALING}yarn_beta_slow",
    "window_pattern": _PATTERN,
}
"""The metadata of fields that no architecture's table has. Messages need them."""
_LLAMA3: dict[str, Any] = {
    "rotary_low_frequency": 1.0,
    "rotary_high_frequency": 4.0,
    "rotary_trained_length": 8192,
}
"""What Llama 3.1 and 3.2 scale their rotary frequencies by; files have only the result."""


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
    fields |= _biases(arch, shapes)
    if name == "gptneox" and read.flag(PARALLEL):
        fields["norm_placement"] = "parallel"
    if fields.get("n_expert"):
        if fields["bias"]:
            raise UsageError("it has experts and biases, which is not supported")
        fields["moe_renormalise"] = True
    _add_window(fields, read)
    _add_widths(fields, read)
    if fields.get("position") == "rotary":
        _add_scaling(fields, read)
    try:
        config = ModelConfig(**fields)
    except UsageError as error:
        raise UsageError(_with_their_names(str(error), name)) from None
    return _with_factors(config) if ROPE_FACTORS in shapes else config


def _with_their_names(message: str, name: str) -> str:
    """A message about fields of :class:`ModelConfig` with the names of the metadata."""
    names = {**_NAMES, **ARCHITECTURES[name].keys}
    return re.sub(
        r"model\.(\w+)",
        lambda match: f"{name}.{names[match[1]]}" if match[1] in names else match[0],
        message,
    )


class _Metadata:
    """The metadata of an architecture, with checks."""

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        mine = f"{name}."
        self.name = name
        self.theirs = {k.removeprefix(mine): v for k, v in metadata.items() if k.startswith(mine)}

    def check(self, arch: Architecture) -> None:
        """Refuse metadata that are not known, unless they are 0 or empty."""
        known = {*arch.keys.values(), *_KNOWN}
        known |= {PARALLEL} if self.name == "gptneox" else set()
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


def _biases(arch: Architecture, shapes: Collection[str]) -> dict[str, Any]:
    """Which linear layers have biases: by the architecture, or else by the tensors."""

    def has(known: bool | None, *tensors: str) -> bool:
        return any(f"blk.0.{t}.bias" in shapes for t in tensors) if known is None else known

    return {
        "bias": has(arch.bias, "attn_output"),
        "qkv_bias": "yes" if has(arch.qkv_bias, "attn_q") else "no",
        "mlp_bias": "yes" if has(arch.bias, "ffn_up", "ffn_down") else "no",
    }


def _add_widths(fields: dict[str, Any], read: _Metadata) -> None:
    """The width of a head must be that of its keys, values and rotary pairs."""
    usual = fields["n_embd"] // max(1, fields["n_head"])
    width = fields.get("head_dim") or usual
    for key in ("attention.key_length", "attention.value_length"):
        if (found := read.number(key, int, width)) != width:
            raise UsageError(f"{read.name}.{key} is {found:,}, and must be {width:,}")
    if read.name == "gemma3" and fields["n_layer"] == 62 and usual != width:  # the largest one
        fields["scale_attention_width"] = usual
    if fields.get("position") != "rotary":
        return
    rotated = read.number(ROTATED, int, width)
    if read.name == "gptneox":
        fields["rotary_fraction"] = rotated / max(1, width)
    elif rotated != width:
        raise UsageError(
            f"{read.name}.{ROTATED} is {rotated}, and must be {width}, the width of a head"
        )


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
    key = SCALING + "type"
    kind = read.theirs.get(key, "none")
    if kind not in ("none", "linear", "yarn"):
        raise UsageError(f"{read.name}.{key} is {quoted(kind)}, and must be none, linear or yarn")
    factor = read.number(SCALING + "factor", float, 1.0)
    for other in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (found := read.number(SCALING + other, float, 1.0)) != 1:
            raise UsageError(f"{read.name}.{SCALING}{other} is {found}, and must be 1")
    if kind == "none" or factor in (0, 1):
        return
    if fields.get("window"):  # Gemma
        fields["rotary_scaling_local"] = False
    fields |= {"rotary_scaling": kind, "rotary_scaling_factor": factor}
    if kind == "yarn":
        fields |= {
            "rotary_trained_length": read.number(SCALING + "original_context_length", int, 0),
            "rotary_high_frequency": read.number(SCALING + "yarn_beta_fast", float, 0.0),
            "rotary_low_frequency": read.number(SCALING + "yarn_beta_slow", float, 1.0),
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


def n_layers(tensors: Collection[str]) -> int:
    """How many layers a file has."""
    return len({match[1] for name in tensors if (match := LAYER.match(name))})
