"""Families of models, one file for each."""

from typing import Any

from gpt.config import ModelConfig, UsageError, nearest, quoted
from gpt.interop.families.bloom import Bloom
from gpt.interop.families.family import Family
from gpt.interop.families.gemma3 import Gemma3, Gemma3WithImages
from gpt.interop.families.gpt1 import GPT1
from gpt.interop.families.gpt2 import GPT2
from gpt.interop.families.llama import Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3MoE
from gpt.interop.families.neox import NeoX
from gpt.interop.families.tensors import Part

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(GPT2(), GPT1(), NeoX(), Bloom(), Llama(), Mistral(), Mixtral()),
        *(Qwen2(), Qwen3(), Qwen3MoE(), Gemma3()),
    )
}
"""Maps ``model_type`` of a ``config.json`` to the family. An export takes the first that fits."""
READ_ONLY: dict[str, Family] = {"gemma3": Gemma3WithImages()}
"""Families that are loaded and not exported."""

__all__ = ["FAMILIES", "Family", "Part", "family_for", "family_of"]


def family_of(theirs: dict[str, Any]) -> Family:
    """The family of a ``config.json``; ``UsageError`` names the known ones."""
    kind = theirs.get("model_type")
    known = FAMILIES | READ_ONLY
    if not isinstance(kind, str) or kind not in known:
        names = ", ".join(known)
        raise UsageError(
            f"model_type is {quoted(kind)}, and must be one of {names}{nearest(kind, known)}"
        )
    return known[kind]


def family_for(config: ModelConfig, name: str = "auto") -> Family:
    """The family ``name`` for an export; ``auto`` is the first one that can express the model.

    ``UsageError`` if there is no such family, or if none can; it names the settings that stand in
    the way of the nearest one.
    """
    if name != "auto":
        if name not in FAMILIES:
            names = ", ".join(FAMILIES)
            raise UsageError(
                f"family is {quoted(name)}, and must be auto or one of {names}"
                f"{nearest(name, FAMILIES)}"
            )
        return FAMILIES[name]
    missing = {name: family.missing(config) for name, family in FAMILIES.items()}
    closest = min(missing, key=lambda name: len(missing[name]))
    FAMILIES[closest].exported(config)
    return FAMILIES[closest]
