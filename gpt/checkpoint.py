"""Checkpoints: a folder a step, written beside its place, flushed, hashed, and renamed into it.

::

    RUN/checkpoints/step-00002000/   model.safetensors  training.pt  meta.json
    RUN/best  RUN/last               names of checkpoints, in text files

What is killed half-way is never mistaken for a checkpoint: it has no ``meta.json`` that fits it, or
not yet its name. ``meta.json`` has the format's version, the model's configuration, and
the SHA-256 of each file and of itself. Weights are safetensors; ``training.pt`` is loaded with
``weights_only=True``. Nothing here unpickles.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt.config import ModelConfig, UsageError
from gpt.model.gpt import GPT

FORMAT = 1
WEIGHTS, TRAINING, META = "model.safetensors", "training.pt", "meta.json"
Pointer = Literal["best", "last"]
Say = Callable[[str], None]

_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its ``meta.json`` says."""

    path: Path
    step: int
    model: ModelConfig
    metrics: dict[str, float]


def save(
    run: Path, step: int, *, model: GPT, training: Mapping[str, Any], metrics: Mapping[str, float]
) -> Path:
    """Write the checkpoint of ``step`` into the folder ``run``; it is whole, or it is not there."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step-{step:08d}"
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=folder))
    try:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(weights, work / WEIGHTS)
        torch.save(dict(training), work / TRAINING)
        meta = {
            "format": FORMAT,
            "step": step,
            "model": dataclasses.asdict(model.config),
            "metrics": dict(metrics),
            "files": {name: _sha256(work / name) for name in (WEIGHTS, TRAINING)},
        }
        meta["sha256"] = _checksum(meta)
        (work / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, TRAINING, META):
            (work / name).chmod(0o644)
            _flush(work / name)
        _flush(work)
        work.chmod(0o755)
        if place.exists():  # a broken one, or the same step of a run that was resumed before it
            place.rename(work / "replaced")
        work.rename(place)
        shutil.rmtree(place / "replaced", ignore_errors=True)
        _flush(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def point(run: Path, name: Pointer, checkpoint: Path) -> None:
    """Let ``RUN/name`` name the checkpoint, in one step."""
    write_atomically(run / name, checkpoint.name + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's text in one step, flushed to disk."""
    work = path.with_name(f".{path.name}.new")
    work.write_text(text, encoding="utf-8")
    _flush(work)
    work.replace(path)
    _flush(path.parent)


def prune(run: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints and those that ``best`` and ``last`` name."""
    named = {_pointed(run, "best"), _pointed(run, "last")}
    for path in list(_newest_first(run))[keep:]:
        if path.name not in named:
            shutil.rmtree(path)
    for path in (run / "checkpoints").glob(".step-*"):  # what a killed save has left
        shutil.rmtree(path)


def find(path: Path, name: Pointer = "best", *, say: Say = lambda text: None) -> Checkpoint | None:
    """The checkpoint at ``path``, or the one that the run at ``path`` calls ``name``.

    When that one is missing or broken, the newest valid one, saying so. ``None`` if the run has no
    checkpoint yet; ``UsageError`` if it has some and none is valid, or if ``path`` is one and
    broken.
    """
    if (path / META).exists():
        return verify(path)
    wanted = _pointed(path, name)
    paths = sorted(
        _newest_first(path), key=lambda p: p.name != wanted
    )  # stable: the rest newest first
    problems = []
    for candidate in paths:
        try:
            checkpoint = verify(candidate)
        except UsageError as error:
            problems.append(str(error))
            say(f"{error}; looking for an older checkpoint")
        else:
            if wanted and candidate.name != wanted:
                say(f"{path / name} names {wanted}, which is not valid; taking {candidate.name}")
            return checkpoint
    if problems:
        raise UsageError(f"the run {path} has no valid checkpoint: {problems[0]}")
    return None


def verify(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, its files' hashes checked; ``UsageError`` if it is not whole."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        version = meta["format"]
        if version != FORMAT:
            raise UsageError(
                f"the checkpoint {path} has format {version}, and this program reads {FORMAT}"
            )
        if meta.pop("sha256") != _checksum(meta):
            raise UsageError(f"the checkpoint {path} is damaged: {META} is not what was saved")
        for name, expected in meta["files"].items():
            if _sha256(path / name) != expected:
                raise UsageError(f"the checkpoint {path} is damaged: {name} is not what was saved")
        return Checkpoint(path, meta["step"], ModelConfig(**meta["model"]), meta["metrics"])
    except OSError as error:
        raise UsageError(
            f"the checkpoint {path} cannot be read: {error.strerror} ({error.filename})"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the checkpoint {path} is damaged: {META} is broken ({error!r})"
        ) from None


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> GPT:
    """The checkpoint's model in evaluation mode, made without a second copy of its weights."""
    with torch.device("meta"):
        model = GPT(checkpoint.model)
    weights = dict(_tensors(checkpoint.path / WEIGHTS, device=device, dtype=dtype))
    has = {(name, weight.shape) for name, weight in weights.items()}
    wants = {(name, parameter.shape) for name, parameter in model.named_parameters()}
    if has != wants:
        odd = ", ".join(sorted({name for name, _ in has ^ wants}))
        raise UsageError(f"the checkpoint {checkpoint.path} does not fit its configuration: {odd}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


def load_training(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``training`` that was saved, on the CPU."""
    state: dict[str, Any] = torch.load(
        checkpoint.path / TRAINING, map_location="cpu", weights_only=True
    )
    return state


def _tensors(
    path: Path, *, device: torch.device | str, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """A safetensors file's tensors; each is mapped alone, so a conversion keeps no page of the
    others.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name).to(device=device, dtype=dtype)
    except SafetensorError as error:
        raise UsageError(f"the weights {path} cannot be read: {error}") from None


def _newest_first(run: Path) -> Iterator[Path]:
    folder = run / "checkpoints"
    if folder.is_dir():
        paths = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
        yield from sorted(paths, key=lambda p: int(p.name[5:]), reverse=True)


def _pointed(run: Path, name: Pointer) -> str | None:
    try:
        return (run / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(meta: Mapping[str, Any]) -> str:
    """SHA-256 of what ``meta.json`` says beside it."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
