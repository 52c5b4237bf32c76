"""What ``gpt doctor`` finds: a line with a status, and what to do."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "advice", "failed"]
"""``note``: something optional is not there. ``advice``: something would be faster or would work
after a change. ``failed``: a result is wrong."""


@dataclass(frozen=True)
class Finding:
    """A line of the output."""

    name: str
    status: Status
    said: str
    advice: str = ""
    """What to do."""


def ok(name: str, said: str) -> Finding:
    """A finding that needs nothing to be done."""
    return Finding(name, "ok", said)


def advice(name: str, said: str, what: str) -> Finding:
    """A finding with something to do."""
    return Finding(name, "advice", said, what)


def note(name: str, said: str, what: str = "") -> Finding:
    """A finding about something that is optional."""
    return Finding(name, "note", said, what)
