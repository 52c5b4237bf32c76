"""Named tensors on disk: one safetensors file, or a folder of shards that processes write together.

The shards are those of torch.distributed.checkpoint, in safetensors. Another number of processes
can read them than wrote them. All functions take the path without the suffix: ``model`` is the file
``model.safetensors``, or the folder ``model``.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt.config import UsageError

ALIGNMENT = 16
"""Bytes. In a file, a tensor can be at any address. On some processors, matrix products round
differently if the address is not a multiple of this (measured on an AMD EPYC with AVX-512).
"""


def is_aligned(tensor: Tensor) -> bool:
    """Whether ``tensor`` begins at a multiple of :data:`ALIGNMENT`."""
    return tensor.data_ptr() % ALIGNMENT == 0


def write(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write one file. Raises ``OSError`` if the disk fails."""
    file = _file(path)
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    with _as_os_error(file):
        save_file(contiguous, file, metadata=metadata)
    file.chmod(0o644)


def write_shards(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write a folder, by all processes of ``group`` together. Each writes its shards of a
    ``DTensor``; one of them writes the other tensors, which are the same on all. If one process
    fails, all raise ``OSError``.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        with _as_os_error(path):
            raise reason from None


def read(path: Path, into: Mapping[str, Tensor]) -> None:
    """Copy the saved tensors of the same names to the tensors ``into``; to a ``DTensor``, this
    process's shard. Every name must be in the file or folder.
    """
    if not path.is_dir():
        for name, tensor in _each(_file(path), set(into)):
            _fill(into[name], tensor)
        return
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = HuggingFaceStorageReader(str(path))
        load(dict(into), storage_reader=reader, no_dist=True)  # each process for itself


def load(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors, unsharded. Each one is memory-mapped on its own, so that a conversion does not
    keep the others in memory. A tensor that is not aligned in the file is copied: products with the
    loaded tensor then equal those with the saved one, bit for bit.
    """
    if not path.is_dir():
        converted = ((n, t.to(device=device, dtype=dtype)) for n, t in _each(_file(path)))
        return {n: t if is_aligned(t) else t.clone() for n, t in converted}
    tensors = {name: torch.empty_like(like, device="cpu") for name, like in describe(path).items()}
    read(path, tensors)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}


def describe(path: Path) -> dict[str, Tensor]:
    """For each name, a tensor on ``meta`` with the saved shape and dtype."""
    if not path.is_dir():
        return {name: tensor.to("meta") for name, tensor in _each(_file(path))}
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
    }


def _file(path: Path) -> Path:
    return path.with_name(f"{path.name}.safetensors")


def _each(file: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if wanted is None or name in wanted]  # noqa: SIM118
        for name in names:
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise UsageError(f"the tensors {file} cannot be read: {error}") from None


def _fill(target: Tensor, values: Tensor) -> None:
    if not hasattr(target, "device_mesh"):
        target.copy_(values)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor  # half a second

    assert isinstance(target, DTensor)
    mesh, placements = target.device_mesh, target.placements
    here = values.to(mesh.device_type)
    shard = distribute_tensor(here, mesh, placements, src_data_rank=None)
    target.to_local().copy_(shard.to_local())


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Raise safetensors' error for a full disk as ``OSError``. Its text has the error number."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if number is None:
            raise OSError(f"{path} cannot be written: {error}") from None
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code), str(path)) from None
