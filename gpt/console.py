"""Output to the terminal: a console for results, and sentences on standard error."""

import contextlib
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def open_console(file: TextIO | None = None) -> "Console":
    """A console without markup in names; lines are not wrapped unless it is a terminal."""
    from rich.console import Console

    console = Console(file=file, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 10_000
    return console


def tell(text: str) -> None:
    """Write a line to standard error. A closed stream is no error."""
    with contextlib.suppress(OSError):  # nothing reads standard error any more
        sys.stderr.write(text + "\n")


def files_of(n: int) -> str:
    """``n`` files, in words."""
    return "1 file" if n == 1 else f"{n:,} files"
