"""Weights in Hugging Face's files, read tensor by tensor: safetensors or pickles, whole or sharded.

A file is mapped into memory, and mapped anew after each 32 MB that were read from it: what was
converted does not stay resident, so the peak is the weights' own size and little more.
"""

import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.config import UsageError

WHOLE = ("model.safetensors", "pytorch_model.bin")
MAPPED_BYTES = 32 << 20


class WeightFiles:
    """The tensors of a folder, by name. Safetensors come before pickles, whole files before
    shards.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for name in WHOLE:
            if (path := folder / name).exists():
                self.files = dict.fromkeys(_names(path), path)
                return
            if (index := folder / f"{name}.index.json").exists():
                self.files = _sharded(folder, index)
                return
        wanted = ", ".join(WHOLE)
        raise UsageError(f"{folder} has no weights in it: none of {wanted}, nor an index of shards")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, mapped: to be copied before the next one is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, wanted in by_file.items():
            yield from _read(path, wanted)


def _sharded(folder: Path, index: Path) -> dict[str, Path]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the index {index} is broken ({error!r})") from None
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise UsageError(f"the index {index} names {name!r}, which is not beside it")
    held = {name: set(_names(folder / name)) for name in names}
    for tensor, name in places.items():
        if tensor not in held[name]:
            raise UsageError(f"the index {index} has {tensor} in {name}, which does not have it")
    return {tensor: folder / name for tensor, name in places.items()}


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UsageError(f"the weights {path} cannot be read: {error}") from None
    return list(_unpickled(path))


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    start = 0
    while start < len(names):
        seen, end = 0, start
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                while end < len(names) and seen < MAPPED_BYTES:
                    tensor = file.get_tensor(names[end])
                    yield names[end], tensor
                    seen, end = seen + tensor.nbytes, end + 1
        else:
            tensors = _unpickled(path)
            while end < len(names) and seen < MAPPED_BYTES:
                tensor = tensors[names[end]]
                yield names[end], tensor
                seen, end = seen + tensor.nbytes, end + 1
            del tensors, tensor
        start = end


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle that holds nothing else: what wants more is refused, and not run."""
    try:
        state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "").strip()
        raise UsageError(
            f"{path} is refused: it is no file of tensors alone, and reading it could run code"
            + (f" ({reason[:160]})" if reason else "")
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise UsageError(f"the weights {path} cannot be read: {str(error)[:200]}") from None
    if not (isinstance(state, dict) and all(isinstance(t, Tensor) for t in state.values())):
        raise UsageError(f"the weights {path} are no dictionary of tensors")
    return state
