"""Checkpoints: one folder for each step, written under a temporary name and renamed when complete.

::

    RUN/checkpoints/step-00002000/   model.safetensors  training.safetensors  meta.json
    RUN/best  RUN/last               names of checkpoints, in text files

A save that was killed never counts as a checkpoint: it has a temporary name or no matching
``meta.json``. ``meta.json`` has the format's version, the model's configuration, the run's
progress, and the SHA-256 of each file and of itself. If the state is too large for one host,
``model/`` and ``training/`` are folders of shards instead of files (:mod:`gpt.tensors`). Nothing
here runs pickled code; the ``training.pt`` of format 1 is loaded with ``weights_only=True``.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt import tensors
from gpt.config import ModelConfig, UsageError, foreign, quoted, with_present_names
from gpt.files import check_regular, flush, parse_json, write_atomically
from gpt.model.gpt import GPT, parameter_count

FORMAT = 2
MODEL, TRAINING, META = "model", "training", "meta.json"
Pointer = Literal["best", "last"]
Say = Callable[[str], None]
T = TypeVar("T")

_NAME = re.compile(r"step-\d{8,}")


class DamagedError(UsageError):
    """A checkpoint whose files have changed since it was saved."""


class NewerError(UsageError):
    """A checkpoint of a format that is too new for this program."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The content of a checkpoint."""

    step: int
    model: ModelConfig
    weights: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    """The optimizers' state, as ``parameter/name``."""
    progress: Mapping[str, Any]
    """Everything else that resuming needs, as values that JSON can hold."""
    metrics: Mapping[str, float]

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return name_of(self.step)


def name_of(step: int) -> str:
    """The name of the folder for the checkpoint of ``step``."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found on disk and checked."""

    path: Path
    format: int
    step: int
    model: ModelConfig
    metrics: dict[str, float]
    progress: dict[str, Any]


def save(run: Path, state: State, *, own: Collection[str] = ()) -> Path:
    """Write a checkpoint into the folder ``run``, completely or not at all.

    It replaces a checkpoint of the same step. If ``RUN/checkpoints`` is a link and ``own`` does not
    name the old checkpoint, the old one is renamed instead. Raises ``OSError`` if the disk fails.
    """
    with _draft(run, state) as work:
        tensors.write(work / MODEL, state.weights)
        tensors.write(work / TRAINING, state.training)
        files = _files(work)
        hashes = {name: _flush_and_hash(work / name) for name in files}
        return _finish(run, work, state, hashes, own)


def save_sharded(
    run: Path, state: State, group: dist.ProcessGroup, *, own: Collection[str] = ()
) -> Path:
    """Like :func:`save`, by all processes of ``group`` together: each writes its own shards.

    If one process fails, all raise ``OSError``.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def first(work: Callable[[], T]) -> T:
        result: T = _everywhere(lambda: work() if rank == 0 else None, group)[0]  # type: ignore[assignment]
        return result

    with contextlib.ExitStack() as stack:
        work = first(lambda: stack.enter_context(_draft(run, state)))
        for part, content in ((MODEL, state.weights), (TRAINING, state.training)):
            _everywhere(lambda: tensors.write_shards(work / part, content, group), group)  # noqa: B023
        mine = _files(work)[rank::size]
        parts = _everywhere(lambda: {name: _flush_and_hash(work / name) for name in mine}, group)
        files = {name: digest for part in parts for name, digest in part.items()}
        return first(lambda: _finish(run, work, state, files, own))


def _everywhere(work: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """The result of ``work`` on each process. If it fails on one, all raise ``OSError``."""
    try:
        outcome: tuple[T | None, str] = (work(), "")
    except OSError as error:
        outcome = (None, str(error))
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group)
    for _, problem in outcomes:
        if problem:
            raise OSError(problem)
    return [result for result, _ in outcomes]


@contextlib.contextmanager
def _draft(run: Path, state: State) -> Iterator[Path]:
    """A temporary folder next to the checkpoint; deleted at the end unless it was renamed."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{state.name}-", dir=folder))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _files(work: Path) -> list[str]:
    paths = (path for path in work.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(work)) for path in paths)


def _finish(
    run: Path, work: Path, state: State, files: Mapping[str, str], own: Collection[str]
) -> Path:
    """Write ``meta.json`` with the ``files`` (hashes by name), and rename the folder to its final
    name.
    """
    meta = {
        "format": FORMAT,
        "step": state.step,
        "model": dataclasses.asdict(state.model),
        "metrics": dict(state.metrics),
        "progress": dict(state.progress),
        "files": dict(files),
    }
    meta["sha256"] = _checksum(meta)
    (work / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    flush(work / META)
    work.chmod(0o755)
    for folder in {work, *((work / name).parent for name in files)}:
        flush(folder)
    path = run / "checkpoints" / state.name
    if os.path.lexists(path):  # damaged, or the run was resumed from an earlier step
        if path.parent.is_symlink() and state.name not in own:
            _set_aside(path, "replaced")
        else:
            _delete(path)
    work.rename(path)
    flush(path.parent)
    return path


def point(run: Path, name: Pointer, checkpoint: str) -> None:
    """Write the checkpoint's name to the file ``RUN/name``, atomically."""
    write_atomically(run / name, checkpoint + "\n")


def pointed(run: Path, name: Pointer) -> str | None:
    """The checkpoint that ``RUN/name`` names, or ``None``; ``UsageError`` if ``RUN/name`` is not a
    file.
    """
    path = run / name
    if not path.exists():
        return None
    check_regular(path, "the pointer")
    try:
        with path.open("rb") as file:
            return file.read(1000).decode(errors="replace").strip()
    except OSError:
        return None


def prune(run: Path, *, keep: int, keep_every: int = 0, own: Collection[str] = ()) -> list[str]:
    """Delete old checkpoints; returns a sentence for each one that cannot be deleted.

    The newest ``keep`` stay, those at multiples of ``keep_every`` steps, and those that ``best``
    and ``last`` name. If ``RUN/checkpoints`` is a link, another run may have checkpoints there, so
    only those in ``own`` are deleted.
    """
    named = {pointed(run, "best"), pointed(run, "last")}
    linked = (run / "checkpoints").is_symlink()
    problems = []
    for path in list(_newest_first(run))[keep:]:
        if linked and path.name not in own:
            continue
        if path.name not in named and not (keep_every and _step(path) % keep_every == 0):
            try:
                _delete(path)
            except OSError as error:
                problems.append(f"the old checkpoint {path} cannot be deleted: {error}")
    if not linked:
        for path in (run / "checkpoints").glob(".step-*"):  # left by a killed process
            shutil.rmtree(path, ignore_errors=True)
    return problems


def set_aside(run: Path, *, newer_than: int) -> list[Path]:
    """Rename the damaged checkpoints after step ``newer_than`` to ``damaged-NAME``; returns their
    new paths.
    """
    aside = []
    for path in list(_newest_first(run)):
        if _step(path) > newer_than:
            aside.append(_set_aside(path, "damaged"))
    return aside


def _set_aside(path: Path, why: str) -> Path:
    """Rename the folder so that it no longer counts as a checkpoint."""
    target = path.with_name(f"{why}-{path.name}")
    while os.path.lexists(target):
        target = target.with_name(f"{target.name}-again")
    return path.rename(target)


def find(path: Path, name: Pointer = "best", *, say: Say = lambda text: None) -> Checkpoint | None:
    """The checkpoint at ``path``, or the ``best`` or ``last`` one of the run at ``path``.

    ``last`` is the newest valid checkpoint, even if ``RUN/last`` names another one: the run may
    have been killed before it wrote ``RUN/last``. If the best one is missing or damaged, the newest
    valid one is returned too. ``say`` gets a sentence for each checkpoint that is passed over.
    Returns ``None`` if the run has no checkpoint yet. Raises ``UsageError`` if it has checkpoints
    and none is valid, if a checkpoint that may be valid cannot be read, or if ``path`` itself is a
    damaged checkpoint.
    """
    if (path / META).exists():
        return verify(path)
    wanted = pointed(path, name)
    paths = list(_newest_first(path))
    if name == "best":
        paths.sort(key=lambda p: p.name != wanted)  # stable: the others stay newest first
    problems = []
    for candidate in paths:
        try:
            checkpoint = verify(candidate)
        except DamagedError as error:
            problems.append(str(error))
            say(f"{error}; looking for an older checkpoint")
        else:
            gone = wanted not in {None, *(p.name for p in paths)}
            if problems or gone:
                say(f"{path / name} names {wanted}, and the newest valid one is {candidate.name}")
            return checkpoint
    if problems:
        raise UsageError(f"the run {path} has no valid checkpoint: {problems[0]}")
    return None


def verify(path: Path, *, hashes: bool = True) -> Checkpoint:
    """The checkpoint at ``path``. Raises ``DamagedError`` if it is damaged (with ``hashes``, each
    file's hash is checked), and another ``UsageError`` if it cannot be read.
    """
    try:
        checkpoint, files = _described(path)
        for name, expected in files.items() if hashes else ():
            if _sha256(path / name) != expected:
                raise DamagedError(f"{name} has changed since it was saved")
    except OSError as error:
        kind = DamagedError if isinstance(error, FileNotFoundError) else UsageError
        raise kind(
            f"the checkpoint {foreign(path)} cannot be read: {error.strerror} "
            f"({foreign(error.filename)})"
        ) from None
    except NewerError:
        raise
    except UsageError as error:
        raise DamagedError(f"the checkpoint {foreign(path)} is damaged: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"the checkpoint {foreign(path)} is damaged: {META} is broken ({quoted(error)})"
        ) from None
    return checkpoint


def _described(path: Path) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint that ``meta.json`` describes, and its files' hashes by name."""
    if (path / META).exists():
        check_regular(path / META, "the file")
    meta = parse_json((path / META).read_bytes().decode(), META)
    version = meta["format"]
    if version not in (1, FORMAT):
        raise NewerError(
            f"the checkpoint {foreign(path)} has format {foreign(version)}, and this program reads "
            f"1 to {FORMAT}"
        )
    if meta.pop("sha256") != _checksum(meta):
        raise DamagedError(f"{META} has changed since it was saved")
    step, metrics, progress = meta["step"], meta["metrics"], meta.get("progress", {})
    if type(step) is not int or step < 0:
        raise DamagedError(f"the step in {META} is {quoted(step)}, and must be a number from 0 up")
    if _NAME.fullmatch(path.name) and _step(path) != step:
        raise DamagedError(f"{META} belongs to step {step:,}")
    if not (isinstance(metrics, dict) and isinstance(progress, dict)):
        raise DamagedError(f"the metrics and the progress in {META} must be JSON objects")
    model = ModelConfig(**with_present_names(meta["model"]))
    return Checkpoint(path, version, step, model, metrics, progress), dict(meta["files"])


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> GPT:
    """The checkpoint's model in evaluation mode, loaded without a second copy of the weights."""
    check_size(checkpoint)
    with torch.device("meta"):
        model = GPT(checkpoint.model)
    weights = tensors.load(checkpoint.path / MODEL, device=device, dtype=dtype)
    check_fit(checkpoint, weights, dict(model.named_parameters()))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def check_size(checkpoint: Checkpoint) -> None:
    """``UsageError`` if the configuration describes a model with more than ten times as many
    numbers as the file has, before that model is built. :func:`check_fit` finds smaller
    differences.
    """
    wants = parameter_count(checkpoint.model)
    has = sum(tensor.numel() for tensor in tensors.describe(checkpoint.path / MODEL).values())
    if wants > 10 * has:
        raise UsageError(
            f"the checkpoint {foreign(checkpoint.path)} does not fit its configuration: it has "
            f"{has:,} numbers, and a model of that shape has {wants:,}"
        )


def check_fit(
    checkpoint: Checkpoint, has: Mapping[str, Tensor], wants: Mapping[str, Tensor]
) -> None:
    """``UsageError`` that names the weights that are missing, unexpected, or of another shape."""
    shapes = [{(name, tensor.shape) for name, tensor in side.items()} for side in (has, wants)]
    if shapes[0] != shapes[1]:
        odd = ", ".join(sorted({name for name, _ in shapes[0] ^ shapes[1]}))
        raise UsageError(f"the checkpoint {checkpoint.path} does not fit its configuration: {odd}")


def load_format_1(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``training.pt`` of a checkpoint of format 1."""
    path = checkpoint.path / "training.pt"
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _newest_first(run: Path) -> Iterator[Path]:
    folder = run / "checkpoints"
    if folder.is_dir():
        paths = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
        yield from sorted(paths, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _delete(path: Path) -> None:
    """Rename the checkpoint first, so that a half-deleted one does not count as a checkpoint."""
    if path.is_symlink():  # its target does not belong to this run
        path.unlink()
        return
    gone = path.with_name(f".{path.name}-deleted")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def _sha256(path: Path) -> str:
    check_regular(path, "the checkpoint's file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(meta: Mapping[str, Any]) -> str:
    """SHA-256 of the other fields of ``meta.json``."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _flush_and_hash(path: Path) -> str:
    flush(path)
    return _sha256(path)
