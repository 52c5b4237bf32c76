"""Families of models, one file for each."""

from typing import Any

from gpt.config import UsageError, quoted
from gpt.interop.families.family import Family, Part
from gpt.interop.families.gpt2 import GPT2

FAMILIES: dict[str, Family] = {"gpt2": GPT2()}
"""Maps ``model_type`` of a ``config.json`` to the family."""

__all__ = ["FAMILIES", "Family", "Part", "family_of"]


def family_of(theirs: dict[str, Any]) -> Family:
    """The family of a ``config.json``; ``UsageError`` names the known ones."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = " or ".join(map(repr, FAMILIES))
        raise UsageError(f"model_type is {quoted(kind)}, and must be {known}")
    return FAMILIES[kind]
