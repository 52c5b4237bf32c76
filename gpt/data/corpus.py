"""Sources of text to documents: a named corpus, a UTF-8 file, or a folder of them.

A document is read in pieces of about a million characters, so that a file of any size passes
through little memory. Pieces are cut where a word has ended and white space begins: no tokenizer's
token spans such a place, so the ids of the pieces are the ids of the whole.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.config import UsageError
from gpt.data import shakespeare

PIECE_CHARACTERS = 1 << 20
LONGEST_WORD_PIECES = 4
"""A word longer than these pieces together is cut, for the memory's sake."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order: one a file, read by ``read`` in pieces of text."""

    source: str
    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[str]]

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as its pieces, in order. ``UsageError`` names a file that cannot be
        read.
        """
        return map(self.read, self.files)

    def fingerprint(self) -> bytes:
        """SHA-256 of the documents' contents and order."""
        total = hashlib.sha256(self.read.__name__.encode())
        for path in self.files:
            try:
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise _unreadable(path, error) from None
        return total.digest()


def open_corpus(source: str) -> Corpus:
    """The corpus that ``source`` names; ``UsageError`` if there is no such text."""
    if source in NAMED:
        return NAMED[source]()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        names = ", ".join(sorted(NAMED))
        raise UsageError(
            f"data.source is {source!r}, which is no file, no folder and no named corpus ({names})"
        )
    return Corpus(source, (path,), text_pieces)


def _folder(path: Path) -> Corpus:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    shown = [p for p in files if not any(x.startswith(".") for x in p.relative_to(path).parts)]
    if not shown:
        raise UsageError(f"data.source is the folder {path}, which has no files in it")
    return Corpus(str(path), tuple(shown), text_pieces)


def _shakespeare() -> Corpus:
    return Corpus("shakespeare", tuple(shakespeare.play_files()), play_pieces)


NAMED: dict[str, Callable[[], Corpus]] = {"shakespeare": _shakespeare}


def play_pieces(path: Path) -> Iterator[str]:
    """A play as one piece."""
    yield shakespeare.speeches(path.read_text(encoding="utf-8"))


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces; line ends become line feeds, a byte-order mark is
    dropped.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            held = ""
            while block := file.read(PIECE_CHARACTERS):
                start, held = len(held), held + block
                cut = _last_word_end(held, max(start, 1))
                if not cut and len(held) >= LONGEST_WORD_PIECES * PIECE_CHARACTERS:
                    cut = len(held)
                if cut:
                    yield held[:cut]
                    held = held[cut:]
            if held:
                yield held
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text ({error.reason}: byte 0x{error.object[error.start]:02X}); "
            "convert it, or leave it out"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _last_word_end(text: str, start: int) -> int:
    """The last position from ``start`` on where white space follows a word; 0 if there is none."""
    for i in range(len(text) - 1, start - 1, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be read: {error.strerror}")
