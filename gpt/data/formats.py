"""From one file to its documents: compression, then format.

``.gz``, ``.bz2``, ``.xz`` and ``.zst`` files are decompressed. A text file is one document, or
several with a separator between them. A line of a JSONL file is a document, and so is a row of a
Parquet file.

A document comes as pieces. The pieces of a long text have about a million characters, so a file of
any size needs little memory. They end where a space follows a word or a mark, or a line feed
follows a word. No token of any tokenizer spans such a place, so the ids of the pieces are the ids
of the whole. Only in a text without such a place in 4 million characters, a piece ends elsewhere.
"""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gpt.config import BadBytes, UsageError, quoted
from gpt.data.compression import Tap, blocks
from gpt.data.reading import Reading, check_length, looks_like_utf16, not_utf8
from gpt.data.records import json_lines, parquet_rows
from gpt.files import as_training_text

PIECE_CHARACTERS = 1 << 20
LONGEST_WORD_PIECES = 4
"""A text without an end of a word in this many pieces is cut elsewhere, to limit memory: before a
line feed, else anywhere.
"""
Document = Iterable[str]
"""A document's pieces, in order."""


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
            raise not_utf8(path, error, read - len(error.object), "byte") from None
        if "\0" in text and bad_bytes == "refuse":
            raise looks_like_utf16(path)
        if text and first:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not block:
            return


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    held = ""
    for part in (part for text in texts for part in _slices(text)):
        start, held = len(held), held + part
        if len(held) < PIECE_CHARACTERS:
            continue
        end = _last_word_end(held, max(start, 1))
        if not end and len(held) >= LONGEST_WORD_PIECES * PIECE_CHARACTERS:
            end = _last_word_end(held, 1, marks=True) or len(held)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _last_word_end(text: str, start: int, *, marks: bool = False) -> int:
    """The last position, at ``start`` or later, where white space follows a word; 0 if none. A line
    feed after a punctuation mark counts only with ``marks``: some tokenizers have tokens of both.
    """
    for i in range(len(text) - 1, start - 1, -1):
        before = text[i - 1]
        if (
            text[i] in " \n"
            and not before.isspace()
            and (text[i] == " " or marks or before.isalnum())
        ):
            return i
    return 0


def _separated(texts: Iterator[str], separator: str, path: Path) -> Iterator[str]:
    held = ""
    for text in texts:
        *whole, held = (held + text).split(separator)
        yield from filter(None, whole)
        check_length(held, path, "a document")
    if held:
        yield held


def _jsonl(reading: Reading, path: Path, tap: Tap) -> Iterator[Document]:
    field = reading.text_field
    for where, record in json_lines(reading, path, tap):
        if not isinstance(record, dict) or field not in record:
            raise UsageError(
                f"{where} has no {quoted(field)}; set data.text_field to the field with the text"
            )
        if not isinstance(record[field], str):
            raise UsageError(
                f"{where} has {quoted(record[field])} as its {quoted(field)}, not a string"
            )
        if text := as_training_text(record[field]):
            yield cut(text)


def _parquet(reading: Reading, path: Path, tap: Tap) -> Iterator[Document]:
    field = reading.text_field
    for where, row in parquet_rows(reading, path, tap, [field]):
        if not isinstance(row[field], str | None):
            raise UsageError(
                f"{where} has {quoted(row[field])} as its {quoted(field)}, not a string"
            )
        if row[field]:
            yield cut(as_training_text(row[field]))


FORMATS: dict[str, Callable[[Reading, Path, Tap], Iterator[Document]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}


def documents(reading: Reading, path: Path, tap: Tap) -> Iterator[Document]:
    """The documents of a file, in order. ``UsageError`` names a file that cannot be read."""
    return FORMATS[reading.format_of(path)](reading, path, tap)
