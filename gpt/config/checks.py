"""User errors, and the checks of the fields of every configuration."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

MESSAGE = 800
"""Maximum length of a message, in characters."""
FOREIGN = 300
"""Maximum length of a text that a message quotes."""


class UsageError(ValueError):
    """A mistake of the user. The message is one sentence: what is wrong, where, and what would be
    right.

    Unprintable characters are escaped, and the middle of a very long message is left out, because a
    message may quote a file of any content.
    """

    def __init__(self, message: str) -> None:
        text = "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in message[:10_000])
        if len(text) > MESSAGE:
            text = f"{text[: MESSAGE // 2]} ... {text[-MESSAGE // 2 :]}"
        super().__init__(text)


def foreign(value: object) -> str:
    """A text from outside, prepared for a message: a path, a value, another program's error.
    Unprintable characters are escaped, and the middle of a long text is left out.
    """
    text = str(value)
    if len(text) > FOREIGN:
        text = f"{text[: FOREIGN // 2]} ... {text[-FOREIGN // 2 + 5 :]}"
    text = "".join(c if c.isprintable() else _escaped(c) for c in text)
    return text if len(text) <= FOREIGN else text[: FOREIGN - 4] + " ..."


def quoted(value: object) -> str:
    """The ``repr`` of a value, prepared for a message."""
    try:
        return foreign(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}, too long to show"


def nearest(name: object, known: Iterable[str]) -> str:
    """The suggestion of the ``known`` name that a misspelt one is nearest to; empty if none is."""
    if not isinstance(name, str):
        return ""
    spelled = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name[:99].lower(), spelled, n=1)
    return f"; did you mean {spelled[near[0]]}?" if near else ""


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True)
class Bounds:
    """The values that a number may have."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        words = {"at least": self.at_least, "above": self.above}
        words |= {"at most": self.at_most, "below": self.below}
        said = [f"{word} {bound:.15g}" for word, bound in words.items() if math.isfinite(bound)]
        return " and ".join(said) or "a number"


def number(default: Any, **bounds: float) -> Any:
    """A dataclass field with a default and :class:`Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def check(config: Any, group: str = "") -> None:
    """Check the type, the bounds and the choices of each field. ``UsageError`` names the first
    field that is wrong. Configurations made in Python are checked as those from the command line.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{group}{item.name}"
        wanted = _KINDS.get(item.type)
        if get_origin(item.type) is Literal:
            if not (isinstance(value, str) and value in get_args(item.type)):
                choices = get_args(item.type)
                raise UsageError(
                    f"{name} is {quoted(value)}, and must be one of {', '.join(choices)}"
                    f"{nearest(value, choices)}"
                )
        elif isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            if not isinstance(value, item.type):
                kind = item.type.__name__
                raise UsageError(f"{name} is {quoted(value)}, and must be a {kind}")
        elif wanted is not None and (
            not isinstance(value, wanted[0]) or (isinstance(value, bool) and item.type is not bool)
        ):
            raise UsageError(f"{name} is {quoted(value)}, and must be {wanted[1]}")
        elif item.type in _TEXTS and value is not None:
            texts = isinstance(value, tuple | list) and all(isinstance(t, str) for t in value)
            if not texts:
                raise UsageError(f"{name} is {quoted(value)}, and must be a tuple of texts")
        if isinstance(value, int | float) and not isinstance(value, bool):
            bounds: Bounds = item.metadata.get("bounds", Bounds())
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise UsageError(f"{name} has {value.bit_length():,} bits, and must be below 2**63")
            if value not in bounds:
                raise UsageError(f"{name} is {value}, and must be {bounds}")
        if isinstance(value, str | Path):
            check_text(name, str(value))


_TEXTS = (tuple[str, ...], tuple[str, ...] | None)
_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
    int | None: (int | None, "a whole number"),
    str | None: (str | None, "a text"),
    Path: (Path, "a path"),
    Path | None: (Path | None, "a path"),
}


def check_text(name: str, text: str) -> None:
    """``UsageError`` unless ``text`` can be written to a TOML file and given to the system: Unicode
    without NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} is {foreign(text)}, which is not UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{name} is {foreign(text)}, which has a NUL in it")
