"""Rotary positions in a ``config.json``: ``rope_theta`` and ``rope_scaling``, or since transformers
5 both in ``rope_parameters``.
"""

from collections.abc import Mapping
from typing import Any

from gpt.config import ModelConfig, UsageError, nearest, quoted
from gpt.interop.families.fields import field

_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic_ntk", "yarn": "yarn",
          "llama3": "llama3"}  # fmt: skip
"""Maps their ``rope_type`` to ``rotary_scaling``."""
_FIELDS = {
    "linear": {"rotary_scaling_factor": "factor"},
    "dynamic_ntk": {"rotary_scaling_factor": "factor"},
    "yarn": {
        "rotary_scaling_factor": "factor",
        "rotary_trained_length": "original_max_position_embeddings",
        "rotary_high_frequency": "beta_fast",
        "rotary_low_frequency": "beta_slow",
        "rotary_temperature": "attention_factor",
    },
    "llama3": {
        "rotary_scaling_factor": "factor",
        "rotary_trained_length": "original_max_position_embeddings",
        "rotary_high_frequency": "high_freq_factor",
        "rotary_low_frequency": "low_freq_factor",
    },
}
"""What the numbers of each scaling are called."""
_HARMLESS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"),
    "original_max_position_embeddings",
}


def rotary(
    theirs: dict[str, Any],
    fields: Mapping[str, Any],
    *,
    base: float = 10_000.0,
    names: Mapping[str, str] | None = None,
    fraction: float = 1.0,
    kind: str = "",
) -> dict[str, Any]:
    """The fields of :class:`ModelConfig`. ``names`` are a family's own names, ``fraction`` its
    default, and ``kind`` the kind of layers if they differ in ``rope_parameters``.
    ``UsageError`` for a scaling that is not supported.
    """
    names = names or {}
    given = _objects(theirs, kind)
    found = {
        name: field(
            theirs | {name: given[name]} if name in given else theirs,
            name,
            default,
            float,
            aliases=() if name in given else [n for n in [names.get(name)] if n],
        )
        for name, default in (("rope_theta", base), ("partial_rotary_factor", fraction))
    }
    share = found["partial_rotary_factor"]
    if share != 1 and not names:
        raise UsageError(f"partial_rotary_factor is {quoted(share)}, and must be 1")
    result = {"rotary_base": found["rope_theta"], "rotary_fraction": share}
    return result | _scaling(given, fields)


def _objects(theirs: dict[str, Any], kind: str) -> dict[str, Any]:
    """``rope_parameters``, or else ``rope_scaling``."""
    for name in ("rope_parameters", "rope_scaling"):
        found = theirs.get(name)
        if isinstance(found, dict) and kind and any(isinstance(v, dict) for v in found.values()):
            found = found.get(kind)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise UsageError(f"{name} is {quoted(found)}, and must be an object")
        return found
    return {}


def scaling_names(kind: str) -> dict[str, str]:
    """What the numbers of a ``rotary_scaling`` are called in a ``config.json``."""
    return _FIELDS.get(kind, {})


def _scaling(given: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    rope_type = given.get("rope_type", given.get("type", "default"))
    kind = _KINDS.get(rope_type) if isinstance(rope_type, str) else None
    if kind is None:
        known = ", ".join(_KINDS)
        raise UsageError(
            f"rope_type is {quoted(rope_type)}, and must be one of {known}"
            f"{nearest(rope_type, _KINDS)}"
        )
    if kind == "none":
        return {}
    mine = _FIELDS[kind]
    for name, value in given.items():
        if name not in _HARMLESS | set(mine.values()) and value is not None:
            raise UsageError(
                f"the rope_type {rope_type} has {quoted(name)} {quoted(value)}, which is not "
                "supported"
            )
    result: dict[str, Any] = {"rotary_scaling": kind}
    for own, name in mine.items():
        if (value := field(given, name, None, float)) is not None:
            result[own] = value
    if "factor" not in given:
        raise UsageError(f"the rope_type {rope_type} has no factor")
    if result.get("rotary_scaling_factor") == 1 and kind in ("linear", "llama3"):
        return {}  # which changes nothing
    if kind == "yarn":
        result.setdefault("rotary_trained_length", fields["context_length"])
    return result


def rotary_of(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`rotary`, with the names that all versions read."""
    kinds = {own: theirs for theirs, own in _KINDS.items()}
    result: dict[str, Any] = {"rope_theta": config.rotary_base}
    kind = config.rotary_scaling
    if kind in _FIELDS:
        numbers = {name: getattr(config, own) for own, name in _FIELDS[kind].items()}
        result["rope_scaling"] = {"rope_type": kinds[kind], **numbers}
    return result
