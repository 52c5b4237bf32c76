"""From one file to its bytes, decompressed: ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` by the name's
ending.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt.config import UsageError, foreign
from gpt.files import unreadable

BLOCK = 1 << 20
"""Bytes that are read or decompressed at once."""
_ZSTD_BLOCK = 1 << 12
"""Compressed bytes that are given to zstd at once: each 4 bytes may become 128 KiB."""


@dataclass(frozen=True)
class Tap:
    """Who is told what is read from the disk."""

    content: Callable[[bytes], object] | None = None
    """Receives all bytes of each file, in order."""
    count: Callable[[int], object] | None = None
    """Receives how many bytes were read."""

    def __call__(self, block: bytes) -> None:
        """Tell that ``block`` was read."""
        if self.content is not None:
            self.content(block)
        if self.count is not None:
            self.count(len(block))


NO_TAP = Tap()


def blocks(path: Path, tap: Tap = NO_TAP) -> Iterator[bytes]:
    """The file's bytes, decompressed if its name ends so."""
    try:
        with path.open("rb", buffering=0) as raw:
            file = Tapped(raw, tap)
            yield from COMPRESSIONS.get(path.suffix.lower(), _plain)(file)
    except EOFError:
        raise _damaged(path, "it ends too early") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise unreadable(path, "the text", error) from None


def _damaged(path: Path, why: object) -> UsageError:
    kind = path.suffix.lower().removeprefix(".")
    return UsageError(f"{foreign(path)} is not a whole {kind} file: {foreign(why)}")


class Tapped(io.BufferedReader):
    """A file that tells ``tap`` what is read."""

    def __init__(self, file: io.FileIO, tap: Tap) -> None:
        super().__init__(file, BLOCK)
        self._tap = tap

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size)
        self._tap(block)
        return block


def _plain(file: io.BufferedIOBase | IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _gzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as inner:
        yield from _plain(inner)


def _bz2(file: IO[bytes]) -> Iterator[bytes]:
    try:
        with bz2.BZ2File(file) as inner:
            yield from _plain(inner)
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise zlib.error(str(error)) from None


def _xz(file: IO[bytes]) -> Iterator[bytes]:
    with lzma.LZMAFile(file) as inner:
        yield from _plain(inner)


def _zstd(file: IO[bytes]) -> Iterator[bytes]:
    zstandard = extra("zstandard", "a .zst file", "zstd")
    decompress, data = None, b""
    while data := data or file.read(_ZSTD_BLOCK):
        if decompress is None:
            decompress = zstandard.ZstdDecompressor().decompressobj()
        try:
            yield decompress.decompress(data)
        except zstandard.ZstdError as error:
            raise zlib.error(str(error)) from None
        data = b""
        if decompress.eof:  # another frame may follow
            data, decompress = decompress.unused_data, None
    if decompress is not None:
        raise EOFError


COMPRESSIONS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    ".gz": _gzip,
    ".bz2": _bz2,
    ".xz": _xz,
    ".zst": _zstd,
}


def extra(module: str, what: str, name: str) -> Any:
    """An optional package, imported now; ``UsageError`` says how to install it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(
            f"{what} needs the package {package}, which is not installed: pip install {package} "
            f"(or gpt[{name}])"
        ) from None
