"""The file format of llama.cpp (GGUF, versions 2 and 3): metadata and tensors by name.

::

    "GGUF"  version u32  tensors u64  entries u64
    entries:  key, type u32, value
    tensors:  name, dimensions u32, sizes u64 (the innermost first), type u32, offset u64
    padding to the alignment, then the tensors' data

All numbers are little-endian. A string is its length (u64) and UTF-8. An array is the type (u32) of
its values, their number (u64), and the values. Each length, number, offset and size of a file is
checked against the file's size before anything is allocated.

Reference: the specification in ggml's repository (docs/gguf.md).
"""

import math
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError, foreign, quoted
from gpt.files import check_regular, unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of tensors' data, unless ``general.alignment`` says otherwise."""
DIMENSIONS = 4
"""The most dimensions of a tensor."""


class Format(NamedTuple):
    """How numbers are stored: ``size`` bytes for each block of ``block`` numbers."""

    name: str
    block: int
    size: int


FORMATS = {
    0: Format("F32", 1, 4),
    1: Format("F16", 1, 2),
    2: Format("Q4_0", 32, 18),
    3: Format("Q4_1", 32, 20),
    6: Format("Q5_0", 32, 22),
    7: Format("Q5_1", 32, 24),
    8: Format("Q8_0", 32, 34),
    10: Format("Q2_K", 256, 84),
    11: Format("Q3_K", 256, 110),
    12: Format("Q4_K", 256, 144),
    13: Format("Q5_K", 256, 176),
    14: Format("Q6_K", 256, 210),
    30: Format("BF16", 1, 2),
}
"""The formats of tensors that are supported, by their numbers in files (``ggml_type``)."""
_SCALARS = {
    number: np.dtype(kind)
    for number, kind in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
"""The types of numbers in metadata (``gguf_metadata_value_type``)."""
BOOL, STRING, ARRAY = 7, 8, 9
LENGTH = struct.Struct("<Q")


class Entry(NamedTuple):
    """A tensor of a file. ``shape`` has the outermost dimension first, as in torch."""

    format: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """The number of rows, which are along the innermost dimension."""
        return math.prod(self.shape[:-1])


class GGUF:
    """A file's metadata and tensors. ``UsageError`` for a file that is damaged or not supported.

    ``metadata`` has numbers, texts, lists of texts, and arrays of numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path, "the model")
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise _DamageError("it is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    self.metadata, self.tensors = _Header(content).read()
        except OSError as error:
            raise unreadable(path, "the model", error) from None
        except _DamageError as damage:
            raise UsageError(f"{foreign(path)} is not a sound GGUF file: {damage}") from None

    def open(self) -> "Data":
        """The tensors' data, to be read in a ``with`` statement."""
        return Data(self)


class Data:
    """Reads the tensors of an open file."""

    def __init__(self, gguf: GGUF) -> None:
        self.gguf = gguf
        try:
            self._file = gguf.path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(gguf.path, "the model", error) from None

    def __enter__(self) -> "Data":
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of some rows of a tensor, ``[stop - start, bytes of a row]``."""
        tensor = self.gguf.tensors[name]
        width = tensor.n_bytes // tensor.n_rows
        out = np.empty((stop - start, width), np.uint8)
        view = memoryview(out.reshape(-1).data)
        try:
            self._file.seek(tensor.offset + start * width)
            while view:
                read = self._file.readinto(view)
                if not read:
                    raise UsageError("it was shortened while it was read")
                view = view[read:]
        except OSError as error:
            raise UsageError(f"it cannot be read: {foreign(error.strerror or error)}") from None
        return out


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that is, or is named as, a GGUF file."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class _DamageError(Exception):
    """What is wrong with a file."""


class _Header:
    """Reads a file's header from its beginning to its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.size, self.at = content, len(content), 0

    def read(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        magic = self.take(len(MAGIC), "its first bytes")
        if magic != MAGIC:
            raise _DamageError(f"it begins with {magic!r}, not with {MAGIC!r}")
        version = self.number(4, "its version")
        if version not in VERSIONS:
            big = " (a file for big-endian machines)" if version and not version & 0xFFFF else ""
            raise _DamageError(f"its version is {version}{big}, and this program reads 2 and 3")
        n_tensors = self.number(8, "the number of tensors")
        n_entries = self.number(8, "the number of metadata entries")
        self.check(n_entries, 8 + 4 + 1, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            key = self.text("a metadata key")
            if key in metadata:
                raise _DamageError(f"it has the metadata key {quoted(key)} twice")
            kind = self.number(4, f"the type of {quoted(key)}")
            metadata[key] = self.value(kind, quoted(key))
        self.check(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        found = [self.tensor() for _ in range(n_tensors)]
        return metadata, self.placed(found, metadata.get("general.alignment", ALIGNMENT))

    def take(self, n: int, what: str) -> bytes:
        """The next ``n`` bytes."""
        start, self.at = self.at, self.at + n
        if self.at > self.size:
            raise _DamageError(f"it ends within {what}")
        return self.content[start : self.at]

    def number(self, n: int, what: str) -> int:
        """An unsigned integer of ``n`` bytes."""
        return int.from_bytes(self.take(n, what), "little")

    def check(self, count: int, least: int, what: str) -> None:
        """Refuse a number of things that the rest of the file is too short for."""
        if count * least > self.size - self.at:
            raise _DamageError(f"it says that it has {count:,} {what}, and is too short for them")

    def text(self, what: str) -> str:
        """A string."""
        n = self.number(8, what)
        self.check(n, 1, f"bytes of {what}")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise _DamageError(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """A value of metadata."""
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY:
            value = self.scalars(kind, 1, key)[0].item()
            return bool(value) if kind == BOOL else value
        inner = self.number(4, f"the type of the values of {key}")
        count = self.number(8, f"the number of values of {key}")
        if inner != STRING:
            return self.scalars(inner, count, key)
        self.check(count, LENGTH.size, f"texts in {key}")
        return self.texts(count, key)

    def texts(self, count: int, key: str) -> list[str]:
        """An array of strings. A vocabulary has some hundred thousand, so this is a tight loop."""
        content, size, at, unpack = self.content, self.size, self.at, LENGTH.unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + LENGTH.size
                at = start + unpack(content, at)[0]
                if at > size:
                    raise _DamageError(f"it ends within a text of {key}")
                found.append(content[start:at].decode())
        except struct.error:
            raise _DamageError(f"it ends within the texts of {key}") from None
        except UnicodeDecodeError:
            raise _DamageError(f"a text of {key} is not UTF-8") from None
        self.at = at
        return found

    def scalars(self, kind: int, count: int, key: str) -> NDArray[Any]:
        """An array of numbers."""
        if kind not in _SCALARS:
            raise _DamageError(f"{key} has values of the type {kind}, which is not supported")
        width = _SCALARS[kind].itemsize
        self.check(count, width, f"values in {key}")
        return np.frombuffer(self.take(count * width, key), _SCALARS[kind])

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """The name, type, shape and offset of a tensor."""
        name = self.text("a tensor's name")
        where = f"the tensor {quoted(name)}"
        n = self.number(4, where)
        if not 1 <= n <= DIMENSIONS:
            raise _DamageError(f"{where} has {n:,} dimensions, and must have 1 to {DIMENSIONS}")
        sizes = struct.unpack(f"<{n}Q", self.take(8 * n, where))
        return name, self.number(4, where), sizes[::-1], self.number(8, where)

    def placed(
        self, found: Sequence[tuple[str, int, tuple[int, ...], int]], alignment: Any
    ) -> dict[str, Entry]:
        """The tensors by name, with their offsets from the file's beginning. Together they must not
        be larger than the file.
        """
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _DamageError(
                f"general.alignment is {quoted(alignment)}, and must be a power of two"
            )
        start = -(-self.at // alignment) * alignment
        left = self.size - start
        tensors: dict[str, Entry] = {}
        for name, number, shape, offset in found:
            where = f"the tensor {quoted(name)}"
            if name in tensors:
                raise _DamageError(f"it has {where} twice")
            if number not in FORMATS:
                known = ", ".join(each.name for each in FORMATS.values())
                raise _DamageError(f"{where} has the type {number}, and known are {known}")
            _, block, size = FORMATS[number]
            if 0 in shape or shape[-1] % block:
                raise _DamageError(
                    f"{where} has the shape {list(shape)}, and rows are blocks of {block}"
                )
            if offset % alignment:
                raise _DamageError(f"{where} has the offset {offset:,}, and must be aligned")
            n_bytes = math.prod(shape) // block * size
            left -= n_bytes
            if start + offset + n_bytes > self.size or left < 0:
                raise _DamageError(f"{where} of the shape {list(shape)} does not fit into it")
            tensors[name] = Entry(FORMATS[number].name, shape, start + offset, n_bytes)
        return tensors
