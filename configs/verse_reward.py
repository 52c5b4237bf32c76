"""A reward for verse: the share of lines that have about ten syllables."""

import re
from typing import Any

VOWELS = re.compile(r"[aeiouy]+")
SILENT_E = re.compile(r"(?<=[^aeiouy\W])e\b")


def verse(prompt: str, text: str, record: dict[str, Any]) -> float:
    """The share of lines with nine to eleven syllables; 0 without two whole lines.

    A syllable is a run of vowels, without an e at a word's end. The last line may be incomplete,
    and is not counted.
    """
    lines = [line.lower() for line in text.split("\n")[:-1]]
    counts = [len(VOWELS.findall(SILENT_E.sub("", line))) for line in lines]
    return sum(9 <= n <= 11 for n in counts) / len(counts) if len(counts) >= 2 else 0.0
