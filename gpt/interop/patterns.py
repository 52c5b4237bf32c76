"""How other projects name the patterns of byte-level vocabularies.

``tokenizer.json`` spells the steps of its ``pre_tokenizer`` out, and GGUF has a name in
``tokenizer.ggml.pre`` (as in llama.cpp's ``llama-vocab.cpp``).
"""

from dataclasses import dataclass
from typing import Any

from gpt.config import UsageError, quoted

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Step = tuple[str, str | bool]
_BYTES: Step = ("ByteLevel", False)
"""The bytes of each piece, which is not split again."""


@dataclass(frozen=True)
class Known:
    """The other names of one of :data:`gpt.data.byte_pair.PATTERNS`."""

    pre: tuple[str, ...]
    """GGUF's names. The first one is written."""
    steps: tuple[Step, ...]
    """The steps in ``tokenizer.json``."""
    ignore_merges: bool = False
    """Whether a piece that is a token is taken whole, whatever its merges are."""
    normalisation: str = ""
    """The Unicode form of a text in the released tokenizers, which GGUF does not say."""
    adds_first: bool = False
    """Whether a text begins with ``bos_token_id`` if GGUF does not say."""


KNOWN = {
    "gpt2": Known(
        ("gpt-2", "olmo", "mpt", "phi-2", "gigachat", "jais", "trillion", "modern-bert"),
        (("ByteLevel", True),),
    ),
    "smollm": Known(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (("Digits", True), ("ByteLevel", True)),
    ),
    "llama3": Known(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        (("Split", _WORDS % r"\p{N}{1,3}"), _BYTES),
        ignore_merges=True,
        adds_first=True,
    ),
    "cl100k": Known(
        ("dbrx", "smaug-bpe", "chatglm-bpe"),
        (("Split", _WORDS % r"\p{N}{1,3}"), _BYTES),
    ),
    "qwen2": Known(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
        (("Split", _WORDS % r"\p{N}"), _BYTES),
        normalisation="NFC",
    ),
    "tekken": Known(("tekken",), (("Split", _TEKKEN), _BYTES), ignore_merges=True, adds_first=True),
    "bloom": Known(
        ("bloom", "poro-chat", "gpt3-finnish"),
        (
            ("Split", r" ?[^(\s|[.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" + "])]+"),
            _BYTES,
        ),
    ),
}


def pattern_of_steps(before: dict[str, Any], *, ignore_merges: bool) -> str | None:
    """The pattern of a ``pre_tokenizer``, or ``None`` if it is not a known one."""
    several = before.get("type") == "Sequence"
    parts = before.get("pretokenizers", []) if several else [before]
    steps: list[Step] = []
    for part in parts:
        match part:
            case {"type": "ByteLevel"} if not part.get("add_prefix_space", True):
                steps.append(("ByteLevel", part.get("use_regex", True)))
            case {"type": "Digits", "individual_digits": True}:
                steps.append(("Digits", True))
            case {"type": "Split", "pattern": {"Regex": str() as expression}} if (
                # all pieces of these expressions match
                (part.get("behavior"), part.get("invert", False))
                in (("Isolated", False), ("Removed", True))
            ):
                steps.append(("Split", expression))
            case _:
                return None
    found = [name for name, known in KNOWN.items() if known.steps == tuple(steps)]
    found.sort(key=lambda name: KNOWN[name].ignore_merges != ignore_merges)
    if found == ["bloom"] and parts[0].get("behavior") != "Isolated":
        return None
    return found[0] if found else None


def pattern_of_pre(pre: object) -> str:
    """The pattern that GGUF names ``pre``; ``UsageError`` for an unknown one."""
    for name, known in KNOWN.items():
        if pre in known.pre:
            return name
    names = ", ".join(pre for known in KNOWN.values() for pre in known.pre)
    raise UsageError(f"tokenizer.ggml.pre is {quoted(pre)}, and the known ones are {names}")


def steps_of(pattern: str) -> dict[str, Any]:
    """The ``pre_tokenizer`` of a pattern."""
    parts: list[dict[str, Any]] = []
    for step in KNOWN[pattern].steps:
        match step:
            case ("ByteLevel", bool() as splits):
                parts.append(byte_level(use_regex=splits))
            case ("Digits", _):
                parts.append({"type": "Digits", "individual_digits": True})
            case (_, expression):
                split = {"type": "Split", "pattern": {"Regex": expression}}
                parts.append(split | {"behavior": "Isolated", "invert": False})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The step that writes bytes as printable characters."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
