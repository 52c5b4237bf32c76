"""How other projects name the patterns of byte-level vocabularies.

``tokenizer.json`` spells the steps of its ``pre_tokenizer`` out, and GGUF has a name in
``tokenizer.ggml.pre`` (as in llama.cpp's ``llama-vocab.cpp``).
"""

from dataclasses import dataclass
from typing import Any

from gpt.config import UsageError, quoted
from gpt.data.patterns import STEPS, Step


@dataclass(frozen=True)
class Known:
    """The other names of one of :data:`gpt.data.byte_pair.PATTERNS`."""

    pre: tuple[str, ...]
    """GGUF's names. The first one is written; without one, GGUF cannot say the pattern."""
    ignore_merges: bool = False
    """Whether a piece that is a token is taken whole, whatever its merges are."""
    normalisation: str = ""
    """The Unicode form of a text in the released tokenizers, which GGUF does not say."""
    adds_first: bool = False
    """Whether a text begins with ``bos_token_id`` if GGUF does not say."""


KNOWN = {
    "gpt2": Known(
        ("gpt-2", "olmo", "mpt", "phi-2", "gigachat", "jais", "trillion", "modern-bert"),
    ),
    "smollm": Known(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    "llama3": Known(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        ignore_merges=True,
        adds_first=True,
    ),
    "cl100k": Known(("dbrx", "smaug-bpe", "chatglm-bpe")),
    "cl100k_base": Known(()),
    "qwen2": Known(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
        normalisation="NFC",
    ),
    "tekken": Known(("tekken",), ignore_merges=True, adds_first=True),
    "o200k": Known(("gpt-4o", "llama4")),
    "bloom": Known(("bloom", "poro-chat", "gpt3-finnish")),
    "chinese": Known(()),
    "code": Known(()),
}
"""All of :data:`gpt.data.patterns.PATTERNS`. Those without a name of GGUF are only ours."""


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
    found = [name for name in KNOWN if STEPS[name] == tuple(steps)]
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
