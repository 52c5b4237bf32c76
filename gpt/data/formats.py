"""From one file to its documents: compression, then format.

``.gz``, ``.xz`` and ``.zst`` files are decompressed. A text file is one document, or several with a
separator between them. A line of a JSONL file is a document, and so is a row of a Parquet file.

A document comes as pieces. The pieces of a long text have about a million characters, so a file of
any size needs little memory. They end where white space follows a word. No token of any tokenizer
spans such a place, so the ids of the pieces are the ids of the whole.
"""

import codecs
import contextlib
import gzip
import io
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt.config import BadBytes, DataConfig, TextFormat, UsageError, foreign, quoted, unescaped
from gpt.files import as_training_text, parse_json, unreadable

PIECE_CHARACTERS = 1 << 20
LONGEST_WORD_PIECES = 4
"""A word longer than this many pieces is cut, to limit memory."""
LONGEST_RECORD = 1 << 28
"""Maximum length of a line of JSONL and of a separated document, to limit memory."""
BLOCK = 1 << 20
"""Bytes that are read or decompressed at once."""
_ZSTD_BLOCK = 1 << 12
"""Compressed bytes that are given to zstd at once: each 4 bytes may become 128 KiB."""

Tap = Callable[[bytes], None]
"""Receives each block of bytes that is read from a file."""
Document = Iterable[str]
"""A document's pieces, in order."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become documents; the fields are those of :class:`DataConfig`."""

    format: TextFormat = "auto"
    text_field: str = "text"
    separator: str = ""
    bad_bytes: BadBytes = "refuse"

    @classmethod
    def of(cls, config: DataConfig) -> "Reading":
        """The reading that a configuration asks for."""
        return cls(
            format=config.format,
            text_field=config.text_field,
            separator=unescaped(config.separator),
            bad_bytes=config.bad_bytes,
        )

    def format_of(self, path: Path) -> str:
        """``text``, ``jsonl`` or ``parquet``: as given, or by the name's ending."""
        if self.format != "auto":
            return self.format
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if suffixes and suffixes[-1] in COMPRESSIONS:
            suffixes.pop()
        return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"

    def documents(self, path: Path, tap: Tap) -> Iterator[Document]:
        """The documents of a file, in order. ``UsageError`` names a file that cannot be read."""
        return FORMATS[self.format_of(path)](self, path, tap)


def blocks(path: Path, tap: Tap) -> Iterator[bytes]:
    """The file's bytes, decompressed if its name ends so. ``tap`` receives those on the disk."""
    try:
        with path.open("rb", buffering=0) as raw:
            file = _Tapped(raw, tap)
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


class _Tapped(io.BufferedReader):
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


def _text(reading: Reading, path: Path, tap: Tap) -> Iterator[Document]:
    texts = _decoded(blocks(path, tap), path, reading.bad_bytes)
    if reading.separator:
        for document in _separated(texts, reading.separator, path):
            yield cut(document)
    else:
        yield _pieces(texts)


def cut(text: str) -> Document:
    """A text in memory as pieces."""
    return [text] if len(text) <= PIECE_CHARACTERS else _pieces(iter([text]))


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def _decoded(inner: Iterator[bytes], path: Path, bad_bytes: BadBytes) -> Iterator[str]:
    """The text of UTF-8 blocks. Line ends become line feeds; a byte-order mark is dropped."""
    utf8 = codecs.getincrementaldecoder("utf-8")("strict" if bad_bytes == "refuse" else "replace")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    read, first = 0, True
    while True:
        block = next(inner, b"")
        read += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, read - len(error.object), "byte") from None
        if "\0" in text and bad_bytes == "refuse":
            raise _looks_like_utf16(path)
        if text and first:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not block:
            return


def _not_utf8(path: Path, error: UnicodeDecodeError, start: int, where: str) -> UsageError:
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    at_start = start + error.start == 0 and error.object.startswith(marks)
    if where == "byte" and (b"\0" in error.object or at_start):
        return _looks_like_utf16(path)
    return UsageError(
        f"{foreign(path)} is not UTF-8 text ({error.reason}: byte 0x{error.object[error.start]:02X}"
        f" at {where} {start + error.start:,}); convert it, leave it out, or set data.bad_bytes to "
        "replace"
    )


def _looks_like_utf16(path: Path) -> UsageError:
    return UsageError(
        f"{foreign(path)} has NUL bytes or a UTF-16 mark, and looks like UTF-16; convert it to "
        "UTF-8 (iconv -f UTF-16 -t UTF-8) or leave it out"
    )


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    held = ""
    for part in (part for text in texts for part in _slices(text)):
        start, held = len(held), held + part
        if len(held) < PIECE_CHARACTERS:
            continue
        end = _last_word_end(held, max(start, 1))
        if not end and len(held) >= LONGEST_WORD_PIECES * PIECE_CHARACTERS:
            end = len(held)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _last_word_end(text: str, start: int) -> int:
    """The last position, at ``start`` or later, where white space follows a word; 0 if none."""
    for i in range(len(text) - 1, start - 1, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0


def _separated(texts: Iterator[str], separator: str, path: Path) -> Iterator[str]:
    held = ""
    for text in texts:
        *whole, held = (held + text).split(separator)
        yield from filter(None, whole)
        _check_length(held, path, "a document")
    if held:
        yield held


def _check_length(held: str | bytes, path: Path, what: str) -> None:
    if len(held) > LONGEST_RECORD:
        raise UsageError(
            f"{foreign(path)} has {what} longer than {LONGEST_RECORD:,}; check data.format and "
            "data.separator"
        )


def _jsonl(reading: Reading, path: Path, tap: Tap) -> Iterator[Document]:
    held, number, start = b"", 0, 0
    for block in _with_end(blocks(path, tap)):
        *whole, held = (held + block).split(b"\n")
        for line in whole:
            number += 1
            if text := _record(reading, path, line, number, start):
                yield cut(text)
            start += len(line) + 1
        _check_length(held, path, "a line")


def _with_end(inner: Iterator[bytes]) -> Iterator[bytes]:
    yield from inner
    yield b"\n"  # ends a last line that has no line feed; an empty line is no record


def _record(reading: Reading, path: Path, line: bytes, number: int, start: int) -> str:
    try:
        text = line.decode("utf-8-sig", "strict" if reading.bad_bytes == "refuse" else "replace")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, start + len(line) - len(error.object), "byte") from None
    if not text.strip():
        return ""
    where, field = f"{foreign(path)} line {number:,}", reading.text_field
    item = parse_json(text, where)
    if not isinstance(item, dict) or field not in item:
        raise UsageError(f"{where} has no {quoted(field)}; data.text_field names the text's field")
    if not isinstance(item[field], str):
        raise UsageError(f"{where} has {quoted(item[field])} as its {quoted(field)}, not a string")
    return as_training_text(item[field])


def _parquet(reading: Reading, path: Path, tap: Tap) -> Iterator[Document]:
    parquet = extra("pyarrow.parquet", "a .parquet file", "parquet")
    arrow = extra("pyarrow", "a .parquet file", "parquet")
    field, number = reading.text_field, 0
    strict = "strict" if reading.bad_bytes == "refuse" else "replace"
    inner = blocks(path, tap)
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() in COMPRESSIONS:
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            file.writelines(inner)
        else:
            for _ in inner:  # the tap receives the whole file
                pass
            file = stack.enter_context(path.open("rb"))
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if field not in names:
                raise UsageError(
                    f"{foreign(path)} has no column {quoted(field)}; its columns are "
                    f"{foreign(', '.join(names))}: data.text_field names the text's"
                )
            for batch in table.iter_batches(batch_size=1000, columns=[field]):
                for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                    number += 1
                    if value:
                        yield cut(as_training_text(value.decode("utf-8", strict)))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, 0, f"row {number:,}, byte") from None
        except (arrow.ArrowException, OSError, MemoryError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{foreign(path)} cannot be read as Parquet after row {number:,}: {foreign(error)}"
            ) from None


FORMATS: dict[str, Callable[[Reading, Path, Tap], Iterator[Document]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
