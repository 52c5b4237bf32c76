"""Checkpoints: a folder a step, written beside its place, flushed, hashed, and renamed into it.

::

    RUN/checkpoints/step-00002000/   model.safetensors  training.safetensors  meta.json
    RUN/best  RUN/last               names of checkpoints, in text files

What is killed half-way is never mistaken for a checkpoint: it has no ``meta.json`` that fits it, or
not yet its name. ``meta.json`` has the format's version, the model's configuration, the run's
progress, and the SHA-256 of each file and of itself. Where the state is too large for one host,
``model/`` and ``training/`` are folders of shards instead of files (:mod:`gpt.tensors`). Nothing
here unpickles; the ``training.pt`` of format 1 is loaded with ``weights_only=True``.
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
from gpt.config import ModelConfig, UsageError, foreign, quoted
from gpt.files import check_regular, flush, parse_json, write_atomically
from gpt.model.gpt import GPT, parameter_count

FORMAT = 2
MODEL, TRAINING, META = "model", "training", "meta.json"
Pointer = Literal["best", "last"]
Say = Callable[[str], None]
T = TypeVar("T")

_NAME = re.compile(r"step-\d{8,}")


class DamagedError(UsageError):
    """A checkpoint that is not what was saved."""


class NewerError(UsageError):
    """A checkpoint of a format that this program does not know."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint holds."""

    step: int
    model: ModelConfig
    weights: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    """What the optimizers have learned, as ``parameter/name``."""
    progress: Mapping[str, Any]
    """What else resuming needs, as plain values."""
    metrics: Mapping[str, float]

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return name_of(self.step)


def name_of(step: int) -> str:
    """The folder of the checkpoint of ``step``."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its ``meta.json`` says."""

    path: Path
    format: int
    step: int
    model: ModelConfig
    metrics: dict[str, float]
    progress: dict[str, Any]


def save(run: Path, state: State, *, own: Collection[str] = ()) -> Path:
    """Write the checkpoint into the folder ``run``: it is whole, or it is not there.

    One of the same step is replaced; where ``RUN/checkpoints`` is a link, one that ``own`` does not
    name stays under another name. ``OSError`` where the disk does not take it.
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
    """:func:`save` from all processes of ``group`` at once, each its own shards.

    All raise ``OSError`` if one of them cannot.
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
    """What ``work`` returned on each process; where it failed on one, all raise ``OSError``."""
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
    """A folder to write in, beside the checkpoint's place; deleted unless it was renamed."""
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
    """Write ``meta.json`` for the ``files`` (their hashes by name), and give the folder its
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
    place = run / "checkpoints" / state.name
    if os.path.lexists(place):  # broken, or of a run that was resumed at an earlier step
        if place.parent.is_symlink() and state.name not in own:
            _set_aside(place, "replaced")
        else:
            _delete(place)
    work.rename(place)
    flush(place.parent)
    return place


def point(run: Path, name: Pointer, checkpoint: str) -> None:
    """Let ``RUN/name`` name the checkpoint, in one step."""
    write_atomically(run / name, checkpoint + "\n")


def pointed(run: Path, name: Pointer) -> str | None:
    """The checkpoint that ``RUN/name`` names; ``UsageError`` if that is no file."""
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
    """Delete all but the newest ``keep`` checkpoints, those at multiples of ``keep_every`` steps,
    and those that ``best`` and ``last`` name; what could not be deleted is told.

    Where ``RUN/checkpoints`` is a link, another run may have checkpoints there: only those that
    ``own`` names are deleted.
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
        for path in (run / "checkpoints").glob(".step-*"):  # what a kill has left
            shutil.rmtree(path, ignore_errors=True)
    return problems


def set_aside(run: Path, *, newer_than: int) -> list[Path]:
    """Take the checkpoints after the step ``newer_than``, which are damaged, out of the run, as
    ``damaged-NAME``.
    """
    aside = []
    for path in list(_newest_first(run)):
        if _step(path) > newer_than:
            aside.append(_set_aside(path, "damaged"))
    return aside


def _set_aside(path: Path, why: str) -> Path:
    """Give the checkpoint a name that is none of a checkpoint."""
    place = path.with_name(f"{why}-{path.name}")
    while os.path.lexists(place):
        place = place.with_name(f"{place.name}-again")
    return path.rename(place)


def find(path: Path, name: Pointer = "best", *, say: Say = lambda text: None) -> Checkpoint | None:
    """The checkpoint at ``path``; or of the run at ``path`` its ``best`` one, or its ``last``.

    ``last`` is the newest valid one, whatever ``RUN/last`` names: a kill may come before it is
    written there. Where the best one is missing or broken, the newest valid one is taken too. What
    is passed over is said. ``None`` if the run has no checkpoint yet; ``UsageError`` if it has
    some and none is valid, if one cannot be read that may well be whole, or if ``path`` is one and
    broken.
    """
    if (path / META).exists():
        return verify(path)
    wanted = pointed(path, name)
    paths = list(_newest_first(path))
    if name == "best":
        paths.sort(key=lambda p: p.name != wanted)  # stable: the rest newest first
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
    """The checkpoint at ``path``, its files' ``hashes`` checked; ``DamagedError`` if it is not
    whole, another ``UsageError`` if it cannot be read.
    """
    try:
        checkpoint, files = _described(path)
        for name, expected in files.items() if hashes else ():
            if _sha256(path / name) != expected:
                raise DamagedError(f"{name} is not what was saved")
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
    """What ``meta.json`` says of the checkpoint, and its files' hashes by name."""
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
        raise DamagedError(f"{META} is not what was saved")
    step, metrics, progress = meta["step"], meta["metrics"], meta.get("progress", {})
    if type(step) is not int or step < 0:
        raise DamagedError(f"{META} has {quoted(step)} as its step")
    if _NAME.fullmatch(path.name) and _step(path) != step:
        raise DamagedError(f"{META} is of step {step:,}")
    if not (isinstance(metrics, dict) and isinstance(progress, dict)):
        raise DamagedError(f"{META} has metrics or progress that are no objects")
    model = ModelConfig(**meta["model"])
    return Checkpoint(path, version, step, model, metrics, progress), dict(meta["files"])


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> GPT:
    """The checkpoint's model in evaluation mode, made without a second copy of its weights."""
    check_size(checkpoint)
    with torch.device("meta"):
        model = GPT(checkpoint.model)
    weights = tensors.load(checkpoint.path / MODEL, device=device, dtype=dtype)
    check_fit(checkpoint, weights, dict(model.named_parameters()))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def check_size(checkpoint: Checkpoint) -> None:
    """``UsageError`` if the configuration asks for ten times the numbers that the weights have,
    before a model of that size is built. Smaller differences are named by :func:`check_fit`.
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
    """Raise ``UsageError`` where weights are missing, too many, or of other shapes."""
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
    """Take the checkpoint's name from it first: what is half deleted is none."""
    if path.is_symlink():  # what it leads to is not this run's
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
    """SHA-256 of what ``meta.json`` says beside it."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _flush_and_hash(path: Path) -> str:
    flush(path)
    return _sha256(path)
