"""Records of JSONL and Parquet files: objects with several fields, each with its place."""

import codecs
import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.compression import COMPRESSIONS, NO_TAP, Tap, Tapped, blocks, extra
from gpt.data.reading import Reading, check_length, not_utf8
from gpt.files import as_training_text, parse_json

Record = dict[str, Any]


def read_records(
    files: Iterable[Path], reading: Reading, tap: Tap = NO_TAP
) -> Iterator[tuple[str, Record]]:
    """Each record of the files with its place (file and line, or row), in order.
    ``UsageError`` names what cannot be read.
    """
    for path in files:
        match reading.format_of(path):
            case "jsonl":
                found = json_lines(reading, path, tap)
            case "parquet":
                found = parquet_rows(reading, path, tap)
            case _:
                raise UsageError(
                    f"{foreign(path)} is plain text, and records are objects in a .jsonl or "
                    ".parquet file"
                )
        for where, record in found:
            if not isinstance(record, dict):
                raise UsageError(f"{where} is not an object with fields")
            yield where, _tidied(record)


def _tidied(value: Any) -> Any:
    """``value`` with line feeds as the line ends of all its texts."""
    match value:
        case str():
            return as_training_text(value)
        case list():
            return [_tidied(item) for item in value]
        case dict():
            return {key: _tidied(item) for key, item in value.items()}
    return value


def json_lines(reading: Reading, path: Path, tap: Tap) -> Iterator[tuple[str, Any]]:
    """The values of a file's lines that are not empty."""
    held, number, start, shown = b"", 0, 0, foreign(path)
    strict = "strict" if reading.bad_bytes == "refuse" else "replace"
    for block in _with_end(blocks(path, tap)):
        *whole, held = (held + block).split(b"\n")
        for line in whole:
            number += 1
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8", strict)
            except UnicodeDecodeError as error:
                before = start + len(line) - len(error.object)
                raise not_utf8(path, error, before, "byte") from None
            start += len(line) + 1
            if text.strip():
                where = f"{shown} line {number:,}"
                yield where, parse_json(text, where)
        check_length(held, path, "a line")


def _with_end(inner: Iterator[bytes]) -> Iterator[bytes]:
    yield from inner
    yield b"\n"  # ends a last line that has no line feed; an empty line is no record


def parquet_rows(
    reading: Reading, path: Path, tap: Tap, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, Record]]:
    """The rows of a Parquet file, with all columns or the named ones. A text may be bytes that are
    not UTF-8, and these are refused or replaced.
    """
    parquet = extra("pyarrow.parquet", "a .parquet file", "parquet")
    arrow = extra("pyarrow", "a .parquet file", "parquet")
    number, shown = 0, foreign(path)
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() in COMPRESSIONS:
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            file.writelines(blocks(path, tap))
        else:
            if tap.content is not None:  # the rows are not read in the file's order
                for _ in blocks(path, Tap(tap.content)):
                    pass
            raw = stack.enter_context(path.open("rb", buffering=0))
            file = Tapped(raw, Tap(count=tap.count))
        try:
            table = parquet.ParquetFile(file)
            schema = table.schema_arrow
            missing = [name for name in columns or () if name not in schema.names]
            if missing:
                raise UsageError(
                    f"{foreign(path)} has no column {quoted(missing[0])}; its columns are "
                    f"{foreign(', '.join(schema.names))}: set data.text_field to one of them"
                )
            as_bytes = arrow.schema(
                [
                    field.with_type(arrow.large_binary()) if _is_text(arrow, field.type) else field
                    for field in (schema.field(name) for name in columns or schema.names)
                ]
            )
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for row in batch.cast(as_bytes).to_pylist():
                    number += 1
                    yield f"{shown} row {number:,}", _as_text(row, reading)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error, 0, f"row {number:,}, byte") from None
        except (arrow.ArrowException, OSError, MemoryError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{foreign(path)} cannot be read as Parquet after row {number:,}: {foreign(error)}"
            ) from None


def _is_text(arrow: Any, kind: Any) -> bool:
    return bool(arrow.types.is_string(kind) or arrow.types.is_large_string(kind))


def _as_text(row: Record, reading: Reading) -> Record:
    strict = "strict" if reading.bad_bytes == "refuse" else "replace"
    return {k: v.decode("utf-8", strict) if isinstance(v, bytes) else v for k, v in row.items()}
