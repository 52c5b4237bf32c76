"""The file format of token ids: a header, then the ids.

The header has 256 bytes, little-endian: magic, version, bytes per id (2 if the vocabulary allows,
else 4), vocabulary size, number of ids, SHA-256 of the tokenizer, SHA-256 of the corpus, and a
CRC-32 of the ids followed by the header fields. A reader refuses a file that is truncated, damaged,
or made with another tokenizer. Version 1 has no CRC-32.
"""

import itertools
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError, foreign
from gpt.files import check_regular, unreadable

MAGIC = b"GPTSHARD"
VERSION = 2
HEADER_BYTES = 256
_HEADER = struct.Struct("<8sIIQQ32s32s")
_CHECKSUM = struct.Struct("<I")
_BLOCK = 1 << 20
"""How many ids are read at once for the check."""
RELEASED = 64
"""Reads, after which the pages that they mapped are released: Linux maps up to 2 MB around each
read, and would keep the whole file resident. Released pages stay in the system's cache.
"""
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


_CAN_RELEASE = hasattr(mmap, "MADV_DONTNEED")


@dataclass(frozen=True)
class Shard:
    """Token ids in a memory-mapped file."""

    path: Path
    ids: NDArray[np.uint16] | NDArray[np.uint32]
    corpus: bytes
    memory: mmap.mmap | None = field(default=None, repr=False, compare=False)
    """The mapped file."""
    _reads: Iterator[int] = field(default_factory=lambda: itertools.count(1), compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """The ids from ``start`` on, ``[count]``, or fewer at the end."""
        if next(self._reads) % RELEASED == 0:
            self.release()
        return self.ids[start : start + count]

    def documents(self, end_of_text: int) -> NDArray[np.int64]:
        """Where the ids ``end_of_text`` are, which end the documents, ascending."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(self), _BLOCK):
            found.append(np.flatnonzero(self.read(start, _BLOCK) == end_of_text) + start)
        self.release()
        return np.concatenate(found)

    def release(self) -> None:
        """Unmap the pages that were read; they are mapped again when they are needed."""
        if self.memory is not None and _CAN_RELEASE:
            self.memory.madvise(mmap.MADV_DONTNEED)


class Shards:
    """Several shards that are read as one."""

    def __init__(self, path: Path, parts: Sequence[Shard], corpus: bytes) -> None:
        self.path, self.parts, self.corpus = path, parts, corpus
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._reads, self._touched = itertools.count(1), set[int]()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """As :meth:`Shard.read`, also across shards."""
        end, pieces = min(start + count, len(self)), []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            part = self.parts[number]
            begins = int(self._ends[number]) - len(part)
            pieces.append(part.read(start - begins, end - start))
            self._touched.add(number)
            start, number = int(self._ends[number]), number + 1
        if next(self._reads) % RELEASED == 0:
            for number in self._touched:
                self.parts[number].release()
            self._touched.clear()
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])

    def documents(self, end_of_text: int) -> NDArray[np.int64]:
        """As :meth:`Shard.documents`."""
        starts = [0, *self._ends[:-1].tolist()]
        found = [
            part.documents(end_of_text) + start
            for part, start in zip(self.parts, starts, strict=True)
        ]
        return np.concatenate([np.zeros(0, np.int64), *found])


class ShardWriter:
    """Writes ids to a shard at ``path``, with the fingerprints in its header.

    A context manager. It writes the header at the end if there was no exception, so an incomplete
    file has no header. Such a file is continued after its first ids with the ``state`` that it had
    then.
    """

    def __init__(
        self,
        path: Path,
        *,
        vocab_size: int,
        tokenizer: bytes,
        corpus: bytes,
        state: tuple[int, int] = (0, 0),
    ) -> None:
        self._item_bytes = 2 if vocab_size <= 1 << 16 else 4
        self._fields = vocab_size, tokenizer, corpus
        self._count, self._checksum = state
        self._file = path.open("r+b" if self._count else "wb")
        if self._count and self._file.seek(0, 2) < self._size():
            self._file.close()
            raise UsageError(
                f"{foreign(path)} has fewer ids than it had when its preparation was stopped; "
                "delete the folder, and prepare the text again"
            )
        self._file.seek(0)
        self._file.write(bytes(HEADER_BYTES))
        if self._count:
            self._file.truncate(self._size())
            self._file.seek(0, 2)

    def __len__(self) -> int:
        return self._count

    def _size(self) -> int:
        return HEADER_BYTES + self._count * self._item_bytes

    def write(self, ids: NDArray[np.integer]) -> None:
        """Append ``ids`` ``[n]``."""
        raw = ids.astype(_DTYPES[self._item_bytes]).tobytes()
        self._file.write(raw)
        self._checksum = zlib.crc32(raw, self._checksum)
        self._count += len(ids)

    def flush(self) -> tuple[int, int]:
        """Wait until all ids are on the disk, and return the state: their number and CRC-32."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._count, self._checksum

    def close(self) -> None:
        """Close the file without a header, so that it is incomplete."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(self._header())

    def _header(self) -> bytes:
        vocab_size, tokenizer, corpus = self._fields
        fields = VERSION, self._item_bytes, vocab_size, self._count, tokenizer, corpus
        header = _HEADER.pack(MAGIC, *fields)
        return header + _CHECKSUM.pack(zlib.crc32(header, self._checksum))


def read_shard(path: Path, *, tokenizer: bytes, vocab_size: int, check: bool = True) -> Shard:
    """Open the shard at ``path``, and read its ids once to check them (``check``).

    ``UsageError`` if it is not complete, if it was made with another tokenizer than the one with
    the SHA-256 ``tokenizer``, or if an id is not below ``vocab_size``.
    """
    what, shown = "the token shard", foreign(path)
    check_regular(path, what)
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            size = file.seek(0, 2)
    except OSError as error:
        raise unreadable(path, what, error) from None
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise UsageError(
            f"{shown} is not a token shard, or it is incomplete; delete it and prepare it again"
        )
    _, version, item_bytes, _, count, its_tokenizer, corpus = _HEADER.unpack_from(header)
    if version not in (1, VERSION):
        raise UsageError(
            f"{what} {shown} has format {version}, and this program reads formats 1 and {VERSION}"
        )
    if item_bytes not in _DTYPES:
        raise UsageError(
            f"{what} {shown} has {item_bytes} bytes per id, and must have 2 or 4; delete it and "
            "prepare it again"
        )
    if size != HEADER_BYTES + count * item_bytes:
        raise UsageError(
            f"{what} {shown} is truncated: it has {size:,} bytes and should have "
            f"{HEADER_BYTES + count * item_bytes:,}; delete it and prepare it again"
        )
    if its_tokenizer != tokenizer:
        raise UsageError(
            f"{what} {shown} was made with the tokenizer {its_tokenizer.hex()[:12]}, and the run "
            f"uses {tokenizer.hex()[:12]}"
        )
    dtype = _DTYPES[item_bytes]
    if check:
        checksum = zlib.crc32(header[: _HEADER.size], _checked(path, dtype, vocab_size))
        if version > 1 and (checksum,) != _CHECKSUM.unpack_from(header, _HEADER.size):
            raise UsageError(
                f"{what} {shown} is damaged: its checksum does not match; delete it and prepare it "
                "again"
            )
    if count == 0:
        return Shard(path, np.zeros(0, dtype), corpus)
    ids, memory = mapped(path, dtype, count, HEADER_BYTES)
    return Shard(path, ids, corpus, memory)


def mapped(
    path: Path, dtype: np.dtype[Any], count: int, offset: int
) -> tuple[NDArray[Any], mmap.mmap]:
    """The ids in a file, ``[count]`` from the byte ``offset`` on, and the mapped file."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, dtype, count, offset), memory


def _checked(path: Path, dtype: np.dtype[Any], vocab_size: int) -> int:
    """The CRC-32 of the ids. ``UsageError`` names the first id that is not in the vocabulary."""
    checksum = start = 0
    try:
        with path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while len(ids := np.fromfile(file, dtype, _BLOCK)):
                if ids.max() >= vocab_size:
                    first = int((ids >= vocab_size).argmax())
                    raise UsageError(
                        f"the token shard {foreign(path)} is damaged: the id at index "
                        f"{start + first:,} is {ids[first]:,}, and must be below {vocab_size:,}; "
                        "delete it and prepare it again"
                    )
                checksum = zlib.crc32(ids.data, checksum)
                start += len(ids)
    except OSError as error:
        raise unreadable(path, "the token shard", error) from None
    return checksum
