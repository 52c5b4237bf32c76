"""What is read here of a ``tokenizer.json``, and not by the library: its tokens, and how their
spellings become bytes.
"""

from collections.abc import Callable
from typing import Any

from gpt.config import quoted
from gpt.data.byte_characters import bytes_of_characters

MOST_TOKENS = 10_000_000
"""More than any vocabulary has: a larger id is a damaged file's."""


def check_definition(definition: Any) -> None:
    """``ValueError`` unless ``definition`` has the parts of a ``tokenizer.json`` that are read here
    and not by the library.
    """
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("its model must be of the type BPE")
    vocab = model.get("vocab")
    entries = definition.get("added_tokens") or []
    right = isinstance(vocab, dict) and isinstance(entries, list)
    if not right or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and isinstance(entry.get("special"), bool)
        for entry in entries
    ):
        raise ValueError("its added_tokens must have content, id and special")
    if not vocab or not all(type(i) is int and 0 <= i < MOST_TOKENS for i in all_ids(definition)):
        raise ValueError(f"its tokens must have ids from 0 to {MOST_TOKENS:,}")


def all_ids(definition: Any) -> list[Any]:
    """The ids of the vocabulary and of the added tokens."""
    entries = definition.get("added_tokens") or []
    return [*definition["model"]["vocab"].values(), *(entry.get("id") for entry in entries)]


def parts(component: Any, several: str) -> list[dict[str, Any]]:
    """The steps of a component of ``tokenizer.json``, which is one step or a sequence of steps."""
    if not isinstance(component, dict):
        return []
    if component.get("type") == "Sequence":
        return [step for part in component.get(several, []) for step in parts(part, several)]
    return [component]


def prepends(part: dict[str, Any]) -> Any:
    """Where a Metaspace puts a space before a text: ``always``, ``first`` or ``never``."""
    if part.get("type") != "Metaspace" or not part.get("add_prefix_space", True):
        return "never"
    return part.get("prepend_scheme", "always")


def spelling(decoder: Any) -> Callable[[str], bytes]:
    """What makes the bytes of one token from its spelling in the vocabulary. ``ValueError`` for a
    decoder whose tokens do not simply follow one another.
    """
    steps: list[Callable[[str], str | bytes]] = []
    for part in parts(decoder, "decoders"):
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_byte_level)
            case {"type": "ByteFallback"}:
                steps.append(_byte_fallback)
            case {"type": "Replace", "pattern": {"String": str() as old}, "content": str() as new}:
                steps.append(_replacing(old, new))
            case {"type": "Metaspace", "replacement": str() as old} | {
                "type": "BPEDecoder",
                "suffix": str() as old,
            }:
                steps.append(_replacing(old, " "))
            case {"type": "Fuse"} | {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                pass
            case _:
                raise ValueError(f"its decoder has {quoted(part)}, which is not supported")
    if not steps and decoder != {"type": "Fuse"}:
        raise ValueError(f"its decoder is {quoted(decoder)}, which is not supported")

    def spell(token: str) -> bytes:
        spelled: str | bytes = token
        for step in steps:
            if isinstance(spelled, str):
                spelled = step(spelled)
        return spelled.encode() if isinstance(spelled, str) else spelled

    return spell


def _replacing(old: str, new: str) -> Callable[[str], str]:
    return lambda token: token.replace(old, new)


def _byte_level(token: str) -> bytes:
    values = [bytes_of_characters().get(character) for character in token]
    return token.encode() if None in values else bytes(v for v in values if v is not None)


def _byte_fallback(token: str) -> str | bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token
    return token
