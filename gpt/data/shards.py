"""The on-disk token format: a header that says what the ids are, then the ids.

The header has 256 bytes, little-endian: magic, version, bytes per id (2 where the vocabulary
allows, else 4), vocabulary size, the number of ids, and the SHA-256 of the tokenizer and of the
corpus. A reader refuses a file that is truncated, or that was made with another tokenizer than its
own.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError

MAGIC = b"GPTSHARD"
VERSION = 1
HEADER_BYTES = 256
_HEADER = struct.Struct("<8sIIQQ32s32s")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class Shard:
    """Token ids in a file, mapped into memory: what is not touched is not read."""

    path: Path
    ids: NDArray[np.uint16] | NDArray[np.uint32]
    corpus: bytes

    def __len__(self) -> int:
        return len(self.ids)


class ShardWriter:
    """Writes ids to a new shard at ``path``; the fingerprints go into its header.

    A context manager: the header is written when it is left without an exception, so a file that
    was cut off has none.
    """

    def __init__(self, path: Path, *, vocab_size: int, tokenizer: bytes, corpus: bytes) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._item_bytes = 2 if vocab_size <= 1 << 16 else 4
        self._fields = vocab_size, tokenizer, corpus
        self._count = 0

    def write(self, ids: NDArray[np.integer]) -> None:
        """Append ``ids`` ``[n]``."""
        self._file.write(ids.astype(_DTYPES[self._item_bytes]).tobytes())
        self._count += len(ids)

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
        return _HEADER.pack(MAGIC, *fields)


def read_shard(path: Path, *, tokenizer: bytes) -> Shard:
    """The shard at ``path``; ``UsageError`` if it is no whole shard of the ``tokenizer`` given by
    its SHA-256.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            size = file.seek(0, 2)
    except OSError as error:
        raise UsageError(f"the token shard {path} cannot be read: {error.strerror}") from None
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise UsageError(
            f"{path} is not a token shard, or its writing was cut off; prepare it again"
        )
    _, version, item_bytes, _, count, its_tokenizer, corpus = _HEADER.unpack_from(header)
    if version != VERSION:
        raise UsageError(
            f"the token shard {path} has format {version}, and this program reads {VERSION}"
        )
    if size != HEADER_BYTES + count * item_bytes:
        raise UsageError(
            f"the token shard {path} is truncated: it has {size:,} bytes and should have "
            f"{HEADER_BYTES + count * item_bytes:,}; delete it and prepare it again"
        )
    if its_tokenizer != tokenizer:
        raise UsageError(
            f"the token shard {path} was made with tokenizer {its_tokenizer.hex()[:12]}, and the "
            f"run's is {tokenizer.hex()[:12]}"
        )
    dtype = _DTYPES[item_bytes]
    if count == 0:
        return Shard(path, np.zeros(0, dtype), corpus)
    return Shard(path, np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(count,)), corpus)
