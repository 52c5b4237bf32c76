"""Special tokens in a rendered conversation: those of the template count, those of messages do not.

The special tokens that a chat template writes become their ids. The same characters in a message
stay text: before rendering, a character that occurs nowhere (the mark) is put into each special
token that a message contains or begins or ends with. The text is split at the special tokens that
are still whole, and the marks are removed from the text between them.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gpt.config import UsageError
from gpt.data.tokenizer import Tokenizer, encoder, special_tokens

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, which no text needs."""


def encode_rendered(
    tokenizer: Tokenizer, text: str, mark: str, *, begins: bool = True
) -> list[int]:
    """The ids of a rendered ``text``, in which whole special tokens count and those with a ``mark``
    are text. ``begins`` is whether it is the beginning of the conversation.
    """
    special = special_tokens(tokenizer)
    parts = re.split(f"({_any_of(special)})", text) if special else [text]
    everywhere = getattr(tokenizer, "spaces_after_special", False)
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number % 2:
            ids.append(special[part])
        elif part := part.replace(mark, ""):
            starts = begins if number == 0 else everywhere
            encode = tokenizer.encode if starts else encoder(tokenizer, begins=False)
            ids += encode(part).tolist()
    return ids


def _any_of(texts: Iterable[str]) -> str:
    """An expression for one of ``texts``, the longest that matches."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


class Marker:
    """Puts a mark into each special token in a text, and into a part of one at the text's beginning
    or end, because the template may write the rest of it.
    """

    def __init__(self, special: Collection[str]) -> None:
        self._whole = re.compile(f"(?={_any_of(special)})", re.IGNORECASE) if special else None
        self._beginnings = {token[:n] for token in special for n in range(1, len(token))}
        self._ends = {token[n:] for token in special for n in range(1, len(token))}
        self._longest = max(map(len, special), default=1)

    def mark(self, value: Any, mark: str) -> Any:
        """``value`` with marks in all its texts. Keys and roles are the caller's own, and stay."""
        if isinstance(value, str):
            return self._marked(value, mark) if self._whole else value
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self.mark(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, mark) for item in value]
        return value

    def _marked(self, text: str, mark: str) -> str:
        assert self._whole is not None
        places = {match.start() + 1 for match in self._whole.finditer(text)}
        for n in range(1, min(self._longest, len(text) + 1)):
            if text[-n:] in self._beginnings:
                places.add(len(text) - n + 1)
            if text[:n] in self._ends:
                places.add(n - 1)
        for place in sorted(places, reverse=True):
            text = text[:place] + mark + text[place:]
        return text


def unused_marks(*values: Any) -> list[str]:
    """Marks that are in none of the texts; ``UsageError`` if they leave too few."""
    texts = repr(values)  # in which they are escaped
    unused = [mark for mark in MARKS if f"\\u{ord(mark):04x}" not in texts]
    if len(unused) < 2:
        raise UsageError(
            "the messages contain Unicode's noncharacters U+FDD0 to U+FDEF; remove some"
        )
    return unused
