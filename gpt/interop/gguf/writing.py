"""Write a file in the format of :mod:`gpt.interop.gguf.format`."""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt.files import new_file
from gpt.interop.gguf.format import ALIGNMENT, ARRAY, BOOL, FORMATS, LENGTH, MAGIC, STRING, VERSIONS

_NUMBER_OF = {each.name: number for number, each in FORMATS.items()}


class Planned(NamedTuple):
    """A tensor that will be written: its data are the ``pieces``, one after the other."""

    format: str
    shape: Sequence[int]
    pieces: Iterable[NDArray[np.uint8]]


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Planned]) -> None:
    """Write a new file, atomically. ``UsageError`` if it exists or cannot be written.

    Integers in ``metadata`` become 32-bit numbers, unsigned unless they are in an array. The pieces
    of a tensor are made when they are written, so that memory holds one at a time.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for name, (form, shape, _) in tensors.items():
        number = _NUMBER_OF[form]
        parts += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", number, offset))
        n_bytes = math.prod(shape) // FORMATS[number].block * FORMATS[number].size
        offset += -(-n_bytes // ALIGNMENT) * ALIGNMENT
    with new_file(path) as file:
        file.write(b"".join(parts))
        for planned in tensors.values():
            _pad(file)
            for piece in planned.pieces:
                file.write(np.ascontiguousarray(piece).data)
        _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return LENGTH.pack(len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """A value of metadata, after its type."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", STRING) + _text(value)
    if not value or isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    kind, dtype = (6, "<f4") if isinstance(value[0], float) else (5, "<i4")
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + np.array(value, dtype).tobytes()
