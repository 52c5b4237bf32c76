"""Weights in Hugging Face's files: safetensors or pickles, whole or sharded, memory-mapped.

A tensor that is used in the file's dtype is not copied. When tensors are copied, the pages that
were read are released, so the peak memory is little more than the size of the weights.
"""

import ctypes
import itertools
import mmap
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.config import UsageError, foreign, quoted
from gpt.files import check_regular, read_object
from gpt.interop.pickles import load_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE = ("model.safetensors", "pytorch_model.bin")
PIECE = 1 << 20
"""How many numbers of a tensor are read at once."""


class WeightFiles:
    """The tensors of a folder, by name. Safetensors take precedence over pickles, and whole files
    over shards.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, list[int]] = {}
        """The shape of each tensor."""
        self._files: dict[str, Path] = {}
        for name in WHOLE:
            if (path := folder / name).exists():
                self.shapes = tensor_shapes(path)
                self._files = dict.fromkeys(self.shapes, path)
                return
            if (index := folder / f"{name}.index.json").exists():
                self._files, self.shapes = _sharded(folder, index)
                return
        wanted = ", ".join(WHOLE)
        raise UsageError(
            f"{foreign(folder)} has no weights: neither {wanted} nor an index of shards"
        )

    def tensors(self, names: Iterable[str]) -> Iterator["Stored"]:
        """Each named tensor, contiguous and on the CPU. ``UsageError`` for a tensor that is not
        dense or not floating-point.
        """
        for path, group in itertools.groupby(names, self._files.__getitem__):
            get, mapped = _opened(path)
            for name in group:
                tensor = _got(get, name, path)
                plain = tensor.layout == torch.strided and not tensor.is_meta
                if not plain or tensor.dtype not in FLOATS:
                    kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
                    kind += " without numbers (meta)" if tensor.is_meta else ""
                    raise UsageError(
                        f"{foreign(name)} in {foreign(path)} is {kind}, and must be dense float32, "
                        "bfloat16, float16 or float64"
                    )
                # A tensor of a pickle may be an expanded view.
                whole = tensor.is_contiguous()
                yield Stored(name, tensor if whole else tensor.contiguous(), mapped and whole)


class Stored(NamedTuple):
    """A tensor of a file. If it is ``mapped``, it is read when it is used, and writes go to private
    copies of the pages.
    """

    name: str
    tensor: Tensor
    mapped: bool

    def forget(self, piece: Tensor) -> None:
        """Release the file's pages under a ``piece`` of the tensor, which must not be used
        again.
        """
        if not self.mapped or sys.platform != "linux":
            return
        page, first = mmap.PAGESIZE, piece.data_ptr()
        start = -(-first // page) * page
        size = (first + piece.nbytes) // page * page - start
        if size > 0:
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)

    def equals(self, other: "Stored") -> bool:
        """Whether both have the same numbers. At most one piece of each stays in memory."""
        if self.tensor.shape != other.tensor.shape:
            return False
        if self.tensor.data_ptr() == other.tensor.data_ptr():
            return True
        rows = rows_at_once(self.tensor)
        for one, two in zip(self.tensor.split(rows), other.tensor.split(rows), strict=True):
            if not torch.equal(one, two):
                return False
            self.forget(one)
            other.forget(two)
        return True


def rows_at_once(tensor: Tensor) -> int:
    """How many rows of a tensor are read at once."""
    return max(1, PIECE // max(1, tensor[0].numel()))


def _sharded(folder: Path, index: Path) -> tuple[dict[str, Path], dict[str, list[int]]]:
    what = f"the index {foreign(index)}"
    weight_map = read_object(index, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(p, str) for p in weight_map.values()):
        raise UsageError(f"{what} has the weight_map {quoted(weight_map)}, and needs file names")
    names = sorted(set(weight_map.values()))
    beside = {path.name for path in folder.iterdir()}
    for name in names:
        if name not in beside:
            raise UsageError(f"{what} names {quoted(name)}, which is not in its folder")
    held = {name: tensor_shapes(folder / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise UsageError(
                f"{what} says that {foreign(tensor)} is in {foreign(name)}, but it is not"
            )
    files = {tensor: folder / name for tensor, name in weight_map.items()}
    return files, {tensor: held[name][tensor] for tensor, name in weight_map.items()}


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Each tensor's shape by name. Of a safetensors file only the header is read."""
    if path.suffix != ".safetensors":
        return {name: list(tensor.shape) for name, tensor in load_tensors(path).items()}
    check_regular(path, "the weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"the weights {foreign(path)} cannot be read: {foreign(error)}") from None


def _got(get: Callable[[str], Tensor], name: str, path: Path) -> Tensor:
    try:
        return get(name)
    except (SafetensorError, AttributeError) as error:  # a dtype that torch does not have
        raise UsageError(
            f"{foreign(name)} in {foreign(path)} cannot be read: {foreign(error)}"
        ) from None


def _opened(path: Path) -> tuple[Callable[[str], Tensor], bool]:
    """A function from a tensor's name to the tensor, and whether tensors are mapped. A file stays
    mapped as long as one of its tensors exists.
    """
    if path.suffix == ".safetensors":
        return safe_open(path, framework="pt").get_tensor, True
    return load_tensors(path).__getitem__, zipfile.is_zipfile(path)
