"""From a source of text to documents. A source is a named corpus, a file, a folder, a pattern of
paths such as ``books/*.txt``, or a dataset of the Hugging Face hub.

:mod:`gpt.data.formats` reads the documents of each file, in the order of the paths. Links are
followed, and a file or folder that is found twice is read once. Hidden files are left out, and so
are files that this program wrote: runs, prepared tokens, copies of pipes.
"""

import dataclasses
import functools
import glob
import hashlib
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.config import UsageError, foreign, quoted
from gpt.data import hub_datasets, shakespeare
from gpt.data.compression import NO_TAP, Tap
from gpt.data.formats import Document, documents
from gpt.data.piped import is_copy
from gpt.data.reading import Reading, is_json
from gpt.files import check_regular, unreadable

PREPARED_FILES = ("tokenizer.json", "train.bin", "validation.bin")
"""The files in a folder of prepared tokens."""
CORPUS_FILE = "corpus.json"
"""The file in a folder of prepared tokens that lists its shards."""
Say = Callable[[str], None]
PLAIN = Reading(format="text")
"""Each file is one document of plain text."""


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
    """Documents in a fixed order. ``read`` yields the documents of a file, and tells its tap what
    it reads.
    """

    files: tuple[Path, ...]
    read: Callable[[Path, Tap], Iterator[Document]]
    name: str
    """The way of reading, as part of the fingerprint."""
    folder: Path | None = None
    """The folder that the files come from, if the source is a folder."""

    def documents(self) -> Iterator[Document]:
        """Each document as its pieces, in order. ``UsageError`` names a file that cannot be
        read.
        """
        for path in self.files:
            yield from self.read(path, NO_TAP)

    def survey(self, *, characters: bool = False) -> Survey:
        """Read each document once. ``UsageError`` names a file that cannot be read."""
        total, length = hashlib.sha256(self.name.encode()), 0
        seen = np.zeros(sys.maxunicode + 1, bool)
        for path in self.files:
            digest = hashlib.sha256()
            for piece in (
                piece for document in self.read(path, Tap(digest.update)) for piece in document
            ):
                length += len(piece)
                if characters:
                    seen[np.frombuffer(piece.encode("utf-32-le"), np.uint32)] = True
            total.update(digest.digest())
        return Survey(total.digest(), length, "".join(map(chr, seen.nonzero()[0])))


def open_corpus(
    source: str,
    reading: Reading = PLAIN,
    *,
    field: str = "data.source",
    say: Say = lambda text: None,
) -> Corpus:
    """The corpus that ``source``, the value of the setting ``field``, names. ``UsageError`` if
    there is no such text.

    A file here takes precedence over a named corpus, and ``say`` is told.
    """
    if source.startswith(hub_datasets.PREFIX):
        stream = hub_datasets.opened(source, reading)
        return Corpus((Path(source),), stream, f"dataset {source} {reading}")
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
    if not mode and (found := _matched(path)):
        return _files(found, reading, field)
    if not mode and glob.has_magic(source):
        raise UsageError(f"{field} is {quoted(source)}, which no file matches")
    if not mode:
        raise UsageError(
            f"{field} is {quoted(source)}, which is not a file, a folder or a named corpus "
            f"({', '.join(sorted(NAMED))})"
        )
    if stat.S_ISDIR(mode):
        return _folder(path, reading, field)
    check_regular(path, field)
    return _files([path], reading, field)


def distinct(paths: Iterable[Path]) -> list[Path]:
    """Each file once, under its first name: links and other spellings name the same file."""
    found: dict[object, Path] = {}
    for path in paths:
        try:
            info = path.stat()
        except OSError:
            info = None
        same = (info.st_dev, info.st_ino) if info and info.st_ino else path  # 0: no inode numbers
        found.setdefault(same, path)
    return list(found.values())


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one; a file that is in several is read once."""
    if len(corpora) == 1:
        return corpora[0]
    reads = {path: corpus.read for corpus in reversed(corpora) for path in corpus.files}
    files = tuple(distinct(path for corpus in corpora for path in corpus.files))
    name = "; ".join(dict.fromkeys(corpus.name for corpus in corpora))
    return Corpus(files, lambda path, tap: reads[path](path, tap), name)


def _files(files: list[Path], reading: Reading, field: str, folder: Path | None = None) -> Corpus:
    if reading.format == "auto" and all(is_json(path) for path in files):
        raise UsageError(
            f"{field} has {foreign(files[0])}, and a .json file may be many things; set "
            "data.format to jsonl if each line is a record, or to text to learn the file itself "
            "(jq -c '.[]' makes lines of a list)"
        )
    records = any(reading.format_of(path) != "text" for path in files)
    name = "documents" if records else "text_pieces"
    usual = Reading(format=reading.format)
    for item in dataclasses.fields(reading):
        if (value := getattr(reading, item.name)) != getattr(usual, item.name):
            name += f" {item.name}={value!r}"
    return Corpus(tuple(files), functools.partial(documents, reading), name, folder)


def _matched(pattern: Path) -> list[Path]:
    """The files that a pattern of paths matches, sorted; none if it is no pattern."""
    if not glob.has_magic(str(pattern)):
        return []
    start = Path(pattern.anchor or ".")
    try:
        found = sorted(start.glob(str(pattern.relative_to(pattern.anchor))))
    except (OSError, ValueError):  # such as ** within a name
        return []
    return distinct(path for path in found if path.is_file() and not is_copy(path))


def _mode(path: Path, field: str) -> int:
    """The mode of ``path`` from ``stat``; 0 if it does not exist."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, field, error) from None


def _folder(folder: Path, reading: Reading, field: str) -> Corpus:
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
    return _files(files, reading, field, folder)


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
    prepared = names.issuperset(PREPARED_FILES) or names.issuperset({"tokenizer.json", CORPUS_FILE})
    return bool(run) or prepared


def _play(path: Path, tap: Tap) -> Iterator[Document]:
    [markdown] = documents(PLAIN, path, tap)
    yield [shakespeare.speeches("".join(markdown))]


def _shakespeare() -> Corpus:
    return Corpus(tuple(shakespeare.play_files()), _play, "play_pieces")


NAMED: dict[str, Callable[[], Corpus]] = {"shakespeare": _shakespeare}
