"""Pickles of tensors: checked first, then loaded by torch.

``torch.load(weights_only=True)`` runs no foreign code, but it allows calls that allocate any amount
of memory: ``bytearray(2**36)``, or a storage that is not in the file. So the pickle first runs with
stand-ins that create nothing. It may only rebuild tensors from storages, and all storages together
may not have more numbers than the file has bytes.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gpt.config import UsageError, foreign
from gpt.files import check_regular

_NAMES = (  # the operations that a dictionary of tensors needs
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE "
    "EMPTY_LIST EMPTY_DICT APPEND APPENDS SETITEM SETITEMS NONE NEWFALSE NEWTRUE BININT BININT1 "
    "BININT2 BINFLOAT LONG1 BINUNICODE SHORT_BINSTRING BINGET LONG_BINGET BINPUT LONG_BINPUT"
)
_OPERATIONS = frozenset(_NAMES.split())
_CALLS = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
_LEGACY_PICKLES = 5  # magic number, protocol, system, tensors, keys of the storages


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle that holds only tensors; ``UsageError`` for any other file.

    A pickle that does anything else is refused before it runs. Files from before torch 1.6 are not
    zip archives, and cannot be memory-mapped.
    """
    check_regular(path, "the weights")
    try:
        _look_through(path)
        state: Any = torch.load(
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
        )
    except pickle.UnpicklingError as error:
        reason = foreign(str(error).partition("\n")[0])
        raise UsageError(
            f"{foreign(path)} is refused: it holds more than tensors, so reading it could run code "
            f"or fill the memory ({reason})"
        ) from None
    except Exception as error:  # a file of any content may raise anything
        reason = foreign(str(error).partition("\n")[0]) or type(error).__name__
        raise UsageError(f"the weights {foreign(path)} cannot be read: {reason}") from None
    if not (
        isinstance(state, dict)
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items())
    ):
        raise UsageError(f"the weights {foreign(path)} are not a dictionary of tensors")
    return {name: tensor.detach() for name, tensor in state.items()}


def _look_through(path: Path) -> None:
    """``UnpicklingError`` for a file that does more than rebuild tensors from its own storages."""
    room = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > room:
                raise pickle.UnpicklingError("it is compressed")
        content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        _Look(_next_pickle(io.BytesIO(content), room), room).load()
        return
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            _Look(_next_pickle(file, room), room).load()


def _next_pickle(file: BinaryIO, room: int) -> bytes:
    """The pickle at the file's position. ``UnpicklingError`` for an operation that is not in
    :data:`_OPERATIONS`.
    """
    start = file.tell()
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name not in _OPERATIONS or (name == "LONG_BINPUT" and int(argument or 0) > room):
            raise pickle.UnpicklingError(f"{name} {foreign(argument)}")
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


class _Look(pickle.Unpickler):
    """Runs a pickle with stand-ins for everything that it calls, and counts the numbers of its
    storages.
    """

    def __init__(self, content: bytes, room: int) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._room, self._storages = room, set[Any]()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _CALLS:
            return lambda *arguments: None
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module in ("torch", "torch.storage") and name.endswith("Storage")):
            return name  # a string cannot be called
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        _, _, key, _, numel, *_ = pid
        if key in self._storages:
            return
        self._storages.add(key)
        if not 0 <= numel <= self._room:
            raise pickle.UnpicklingError(f"a storage of {foreign(numel)} numbers")
        self._room -= numel
