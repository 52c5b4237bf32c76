"""From a source of text to documents. A source is a named corpus, a UTF-8 file or a folder.

Each file of a folder is a document, in the order of the paths. Links are followed, and a file or
folder that is found twice is read once. Hidden files are left out, and so are files that this
program wrote: runs, prepared tokens, copies of pipes.

A document is read in pieces of about a million characters, so a file of any size needs little
memory. Pieces end where white space follows a word. No token of any tokenizer spans such a place,
so the ids of the pieces are the ids of the whole.
"""

import codecs
import hashlib
import io
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.config import UsageError, foreign, quoted
from gpt.data import shakespeare
from gpt.data.piped import is_copy
from gpt.files import check_regular, unreadable

PIECE_CHARACTERS = 1 << 20
LONGEST_WORD_PIECES = 4
"""A word longer than this many pieces is cut, to limit memory."""
PREPARED_FILES = ("tokenizer.json", "train.bin", "validation.bin")
"""The files in a folder of prepared tokens."""
Say = Callable[[str], None]
Tap = Callable[[bytes], None]
"""Receives each block of bytes that is read from a file."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus finds out."""

    fingerprint: bytes
    """SHA-256 of the documents' contents and order."""
    length: int
    """Characters in all documents."""
    characters: str
    """The distinct characters, by code point; empty if they were not asked for."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order: one per file. ``read`` yields a file's text in pieces, and passes
    the file's bytes to its tap.
    """

    files: tuple[Path, ...]
    read: Callable[[Path, Tap], Iterator[str]]
    folder: Path | None = None
    """The folder that the files come from, if the source is a folder."""

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as its pieces, in order. ``UsageError`` names a file that cannot be
        read.
        """
        return (self.read(path, lambda block: None) for path in self.files)

    def survey(self, *, characters: bool = False) -> Survey:
        """Read each document once. ``UsageError`` names a file that cannot be read."""
        total, length = hashlib.sha256(self.read.__name__.encode()), 0
        seen = np.zeros(sys.maxunicode + 1, bool)
        for path in self.files:
            digest = hashlib.sha256()
            for piece in self.read(path, digest.update):
                length += len(piece)
                if characters:
                    seen[np.frombuffer(piece.encode("utf-32-le"), np.uint32)] = True
            total.update(digest.digest())
        return Survey(total.digest(), length, "".join(map(chr, seen.nonzero()[0])))


def open_corpus(source: str, *, field: str = "data.source", say: Say = lambda text: None) -> Corpus:
    """The corpus that ``source``, the value of the setting ``field``, names. ``UsageError`` if
    there is no such text.

    A file here takes precedence over a named corpus, and ``say`` is told.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{field} is {quoted(source)}, and that home folder does not exist; give the full path"
        ) from None
    mode = _mode(path, field)
    if source in NAMED and not stat.S_ISREG(mode):
        if stat.S_ISDIR(mode) and not _is_ours(names := _listed(path)) and names:
            say(f"{field} {source} is the named corpus; for the folder, give ./{source}")
        return NAMED[source]()
    if source in NAMED:
        say(f"{field} {source} is the file in this folder, not the named corpus")
    if not mode:
        raise UsageError(
            f"{field} is {quoted(source)}, which is not a file, a folder or a named corpus "
            f"({', '.join(sorted(NAMED))})"
        )
    if stat.S_ISDIR(mode):
        return _folder(path, field)
    check_regular(path, field)
    return Corpus((path,), text_pieces)


def _mode(path: Path, field: str) -> int:
    """The mode of ``path`` from ``stat``; 0 if it does not exist."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, field, error) from None


def _folder(folder: Path, field: str) -> Corpus:
    if _is_ours(_listed(folder)):
        raise UsageError(
            f"{field} is {foreign(folder)}, which is a run or prepared tokens; give the file or "
            "folder of the text itself"
        )
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            info = path.stat()
        except OSError as error:
            raise unreadable(path, "the text", error) from None
        if info.st_ino and (info.st_dev, info.st_ino) in seen:  # 0: the system has no inode numbers
            continue
        seen.add((info.st_dev, info.st_ino))
        if not stat.S_ISDIR(info.st_mode):
            check_regular(path, "the text")
            files.append(path)
        elif not _is_ours(names := _listed(path)):
            waiting += [path / name for name in sorted(names, reverse=True)]
    if not files:
        raise UsageError(f"{field} is the folder {foreign(folder)}, which has no files")
    return Corpus(tuple(files), text_pieces, folder)


def _listed(folder: Path) -> set[str]:
    """The names in ``folder`` that may be text."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, "the folder", error) from None
    return {path.name for path in paths if not (path.name.startswith(".") or is_copy(path))}


def _is_ours(names: set[str]) -> bool:
    """Whether a folder with these names is a run or prepared tokens."""
    run = "config.toml" in names and names & {"tokenizer.json", "metrics.jsonl", "checkpoints"}
    return bool(run) or names.issuperset(PREPARED_FILES)


def _shakespeare() -> Corpus:
    return Corpus(tuple(shakespeare.play_files()), play_pieces)


NAMED: dict[str, Callable[[], Corpus]] = {"shakespeare": _shakespeare}


class _Tapped(io.BufferedReader):
    def __init__(self, file: io.FileIO, tap: Tap) -> None:
        super().__init__(file)
        self._tap = tap

    def read1(self, size: int = -1, /) -> bytes:  # TextIOWrapper.read(n) calls this alone
        block = super().read1(size)
        self._tap(block)
        return block


def play_pieces(path: Path, tap: Tap) -> Iterator[str]:
    """A play as one piece."""
    yield shakespeare.speeches("".join(text_pieces(path, tap)))


def text_pieces(path: Path, tap: Tap) -> Iterator[str]:
    """The text of a UTF-8 file in pieces. Line ends become line feeds; a byte-order mark is
    dropped.
    """
    try:
        raw = _Tapped(path.open("rb", buffering=0), tap)
        with io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
            held = ""
            while block := file.read(PIECE_CHARACTERS):
                if "\0" in block:
                    raise _looks_like_utf16(path)
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
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if b"\0" in error.object or (error.start == 0 and error.object.startswith(marks)):
            raise _looks_like_utf16(path) from None
        raise UsageError(
            f"{foreign(path)} is not UTF-8 text ({error.reason}: byte "
            f"0x{error.object[error.start]:02X}); convert it or leave it out"
        ) from None
    except OSError as error:
        raise unreadable(path, "the text", error) from None


def _looks_like_utf16(path: Path) -> UsageError:
    return UsageError(
        f"{foreign(path)} has NUL bytes or a UTF-16 mark, and looks like UTF-16; convert it to "
        "UTF-8 (iconv -f UTF-16 -t UTF-8) or leave it out"
    )


def _last_word_end(text: str, start: int) -> int:
    """The last position, at ``start`` or later, where white space follows a word; 0 if none."""
    for i in range(len(text) - 1, start - 1, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0
