"""How files become documents and records, and what is said of those that cannot be read."""

import codecs
import contextlib
from dataclasses import dataclass
from pathlib import Path

from gpt.config import BadBytes, DataConfig, TextFormat, UsageError, foreign, unescaped
from gpt.data.compression import COMPRESSIONS
from gpt.files import as_training_text

LONGEST_RECORD = 1 << 28
"""Maximum length of a line of JSONL and of a separated document, to limit memory."""
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


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
            separator=as_training_text(unescaped(config.separator)),
            bad_bytes=config.bad_bytes,
        )

    def format_of(self, path: Path) -> str:
        """``text``, ``jsonl`` or ``parquet``: as given, or by the name's ending."""
        if self.format != "auto":
            return self.format
        return _SUFFIXES.get(_ending(path), "text")


def _ending(path: Path) -> str:
    """The ending of the name, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_json(path: Path) -> bool:
    """Whether it is a ``.json`` file: a text, one value, or a record a line."""
    return _ending(path) == ".json"


_PACKED = "is an archive; unpack it"
_OTHERS = {
    ".pdf": "is a PDF; make a text of it (pdftotext)",
    ".epub": "is a book in a zip file; make a text of it (pandoc)",
    ".docx": "is a document in a zip file; make a text of it (pandoc)",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _PACKED),
}
"""What files are that people take for texts, by their names' endings."""
_PACKED_AS = "is compressed; decompress it, or let its name end in"
_BEGINNINGS = {
    b"%PDF": _OTHERS[".pdf"],
    b"PK\x03\x04": _PACKED,
    b"PAR1": "is a Parquet file; set data.format to parquet",
    b"\x1f\x8b": f"{_PACKED_AS} .gz",
    b"BZh": f"{_PACKED_AS} .bz2",
    b"\xfd7zXZ": f"{_PACKED_AS} .xz",
    b"\x28\xb5\x2f\xfd": f"{_PACKED_AS} .zst",
}
"""The same by what they begin with."""


def _other(path: Path) -> UsageError | None:
    """The error for a file that is no text, by its name or its beginning."""
    kinds = [_OTHERS[each] for each in map(str.lower, path.suffixes) if each in _OTHERS]
    if not kinds and path.suffix.lower() not in COMPRESSIONS:
        with contextlib.suppress(OSError), path.open("rb") as file:
            begins = file.read(8)
            kinds = [what for mark, what in _BEGINNINGS.items() if begins.startswith(mark)]
    return UsageError(f"{foreign(path)} {kinds[0]}, or leave it out") if kinds else None


def not_utf8(path: Path, error: UnicodeDecodeError, start: int, where: str) -> UsageError:
    """The error for bytes that are not UTF-8; ``error.object`` begins at byte ``start``."""
    if where == "byte" and (other := _other(path)):
        return other
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    at_start = start + error.start == 0 and error.object.startswith(marks)
    if where == "byte" and (b"\0" in error.object or at_start):
        return looks_like_utf16(path)
    return UsageError(
        f"{foreign(path)} is not UTF-8 text ({error.reason}: byte 0x{error.object[error.start]:02X}"
        f" at {where} {start + error.start:,}); convert it, leave it out, or set data.bad_bytes to "
        "replace"
    )


def looks_like_utf16(path: Path) -> UsageError:
    """The error for a file with NUL bytes."""
    return _other(path) or UsageError(
        f"{foreign(path)} has NUL bytes or a UTF-16 mark, and looks like UTF-16; convert it to "
        "UTF-8 (iconv -f UTF-16 -t UTF-8) or leave it out"
    )


def check_length(held: str | bytes, path: Path, what: str) -> None:
    """``UsageError`` if the rest of a record has become longer than a record may be."""
    if len(held) > LONGEST_RECORD:
        raise UsageError(
            f"{foreign(path)} has {what} longer than {LONGEST_RECORD:,}; check data.format and "
            "data.separator"
        )
