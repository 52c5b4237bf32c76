"""The preparation of a run: its folder, its configuration, and the checkpoint to resume from."""

import contextlib
import dataclasses
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint
from gpt.config import DataConfig, ModelConfig, TrainConfig, UsageError, quoted, to_toml
from gpt.data import tokenizer as tokenizers
from gpt.data.examples import Examples
from gpt.data.instructions import Instructions
from gpt.data.mixture import Mixture, Total
from gpt.data.prepared import Prepared
from gpt.data.prompts import Records, RecordSet
from gpt.data.shards import Shard, Shards
from gpt.data.tokenizer import Tokenizer
from gpt.device import describe_machine
from gpt.files import unwritable, write_atomically
from gpt.model.adapter import fingerprint, was_trained_over
from gpt.model.gpt import GPT
from gpt.model.surgery import (
    ROTARY,
    crop_context,
    extend_context,
    resize_vocabulary,
    set_dropout,
)
from gpt.training.parallel import World

Say = Callable[[str], None]
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
TEXT = "the text's fingerprint"
FIXED = (
    TEXT, "training.seed", "training.batch_tokens", "optimizer.name", "objective.kind",
    "objective.records", "objective.samples", "objective.updates",
)  # fmt: skip
FIXED_GROUPS = {
    "model": ("dropout",),
    "adapter": ("dropout",),
    "data": ("source", "mixture", "cache_dir"),
}
"""Groups whose settings must not change in a run either, except the named ones."""


def describe_base(config: TrainConfig, model: GPT) -> dict[str, Any]:
    """What a checkpoint of an adapter records of the model under it: its name, the fingerprint of
    its weights, and the adapter's settings.
    """
    here = Path(config.init)
    name = str(here.resolve()) if here.exists() else config.init
    settings = {**dataclasses.asdict(config.adapter), "targets": list(config.adapter.targets)}
    return {"base": name, "fingerprint": fingerprint(model), "settings": settings}


def check_base(checkpoint: Checkpoint, init: str, model: GPT) -> None:
    """``UsageError`` if the adapter in the checkpoint was trained over another model."""
    recorded = checkpoint.progress.get("adapter")
    then = recorded.get("fingerprint") if isinstance(recorded, dict) else None
    if not was_trained_over(model, then):
        raise UsageError(
            f"init is {quoted(init)}, and the adapter in {checkpoint.path} was trained over a "
            "model with other weights"
        )


@contextlib.contextmanager
def held(run: Path) -> Iterator[str]:
    """A context in which only this process can use the run's folder, which it creates if needed."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(run, error) from None
    if (run / ".lock").is_symlink():
        raise UsageError(f"{run / '.lock'} is a link, and must be a regular file")
    try:
        with FileLock(run / ".lock", timeout=0):
            yield str(run)
    except Timeout:
        raise UsageError(
            f"{run} is in use by another process that trains it: wait until it ends, or start "
            "another run with --run_dir"
        ) from None


def checkpoint_to_resume(run: Path, world: World, *, resume: bool, say: Say) -> Checkpoint | None:
    """The run's newest valid checkpoint if ``resume`` is set; ``UsageError`` if there is one and it
    is not set.

    Processes that torchrun restarts after a failure always resume. Newer checkpoints that are
    damaged are renamed, not deleted.
    """
    resolved = str(run.resolve())

    def look() -> str:
        resumes = resume or world.remembers(resolved)
        checkpoint = checkpoints.find(run, "last", say=say)
        if checkpoint is not None and not resumes:
            raise UsageError(
                f"{run} holds a run at step {checkpoint.step:,} already: --resume continues it, "
                "--run_dir starts another one elsewhere"
            )
        if checkpoint is None and resumes:
            say(f"{run} has no checkpoint to resume from; starting at step 0")
        if checkpoint is not None:
            for path in checkpoints.set_aside(run, newer_than=checkpoint.step):
                say(f"a damaged checkpoint was renamed to {path}")
        world.remember(resolved)
        return str(checkpoint.path) if checkpoint else ""

    path = world.broadcast(look)
    return checkpoints.verify(Path(path), hashes=False) if path else None


Initial = Callable[[str | Path], tuple[GPT, Tokenizer]]
"""Loads an initial model and its tokenizer, by the model's name or a checkpoint's path."""


def take_initial_model(
    init: str, wanted: ModelConfig, checkpoint: Checkpoint | None, load: Initial, say: Say
) -> tuple[GPT, Tokenizer]:
    """The model that ``init`` names, or the one in the ``checkpoint``, and its tokenizer. Its
    context, rotary positions, vocabulary and dropout are changed to the ``wanted`` ones.
    """
    model, tokenizer = load(checkpoint.path if checkpoint else init)
    own = model.config.context_length
    if 0 < wanted.context_length < own:
        crop_context(model, wanted.context_length)
        if checkpoint is None:
            say(f"the model's context of {own:,} tokens is cropped to {wanted.context_length:,}")
    elif wanted.context_length > (model.config.most_positions() or wanted.context_length):
        raise UsageError(
            f"model.context_length is {wanted.context_length:,}, and {init} has only {own:,} "
            "positions (0 keeps them)"
        )
    rotary = {}
    for name, value in dataclasses.asdict(wanted).items():
        kept, usual = getattr(model.config, name), getattr(ModelConfig(), name)
        if name in ("vocab_size", "context_length", "dropout") or value in (kept, usual):
            continue
        if name in ROTARY and model.config.position in ("rotary", "xpos"):
            rotary[name] = value
        else:
            say(f"model.{name} is {value}, but {init} keeps its own: {kept}")
    if wanted.context_length > own or rotary:
        longer = max(wanted.context_length, model.config.context_length)
        extend_context(model, longer, **rotary)
        if checkpoint is None:
            changes = "".join(f", {name} {value}" for name, value in rotary.items())
            say(f"the model's context of {own:,} tokens becomes {longer:,}{changes}")
    if wanted.vocab_size > model.config.vocab_size:
        resize_vocabulary(model, wanted.vocab_size)
    set_dropout(model, wanted.dropout)
    for parameter in model.parameters():  # its own memory, with a new model's layout
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model, tokenizer


def resolve(
    config: TrainConfig,
    data: Prepared | Instructions | Mixture | Records,
    checkpoint: Checkpoint | None,
) -> TrainConfig:
    """The configuration with all fields known: the vocabulary's size, and the run's folder.
    ``UsageError`` if ``model.vocab_size`` is too small for the tokenizer.
    """
    tokenizer = data.tokenizer
    there = checkpoint.model.vocab_size if checkpoint else 0
    vocab_size = config.model.vocab_size or max(there, tokenizer.vocab_size)
    if vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"model.vocab_size is {vocab_size}, and the {tokenizers.name_of(tokenizer)} tokenizer "
            f"of {config.data.described} needs {tokenizer.vocab_size} (0 chooses it)"
        )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, run_dir=str(config.run), resume=False, model=model)


BEFORE: dict[str, Any] = {"order": "table", "format": "text"}
"""What auto means for a run that recorded no such field of its data."""


def as_it_began(data: DataConfig, checkpoint: Checkpoint) -> DataConfig:
    """The data's settings, with the order and the format that the checkpoint's run began with
    instead of auto.
    """
    settings = checkpoint.progress.get("settings")
    recorded = settings if isinstance(settings, dict) else {}  # restoring it raises the error
    began: dict[str, Any] = {
        name: recorded.get(f"data.{name}", usual)
        for name, usual in BEFORE.items()
        if getattr(data, name) == "auto"
    }
    return dataclasses.replace(data, **began)


def as_it_was_planned(config: TrainConfig, checkpoint: Checkpoint, say: Say) -> TrainConfig:
    """The configuration with the number of steps that the checkpoint's run was planned with."""
    recorded = checkpoint.progress.get("settings")
    recorded = recorded if isinstance(recorded, dict) else {}
    steps = recorded.get("training.max_steps", config.training.max_steps)
    say(
        f"training.max_minutes plans new runs: this one began with {steps:,} steps, and "
        "training.max_steps without training.max_minutes changes that"
    )
    training = dataclasses.replace(config.training, max_steps=steps, max_minutes=0.0)
    return dataclasses.replace(config, training=training)


def check_changes(
    run: Path, model: ModelConfig, now: Mapping[str, Any], checkpoint: Checkpoint
) -> list[str]:
    """A sentence for each of the :func:`settings` that has changed since the checkpoint;
    ``UsageError`` if one of them must not change. Derived values of the model are not named.
    """
    follows = {
        f"model.{name}"
        for name, value in dataclasses.asdict(checkpoint.model).items()
        if value == getattr(model, name)
    }
    before = checkpoint.progress.get("settings", {})
    before = before if isinstance(before, dict) else {}  # restoring it raises the error
    before = {"data.windows": "crossing"} | before | _resolved(checkpoint.model)
    told = {
        name: f"{name} was {before[name]} and is {value}"
        for name, value in now.items()
        if name not in follows and name in before and before[name] != value
    }
    fixed = [sentence for name, sentence in told.items() if is_fixed(name)]
    free = [sentence for name, sentence in told.items() if not is_fixed(name)]
    if fixed:
        raise UsageError(
            f"{run} cannot be resumed with other settings: {'; '.join(fixed)}"
            + (f" (these may change: {'; '.join(free)})" if free else "")
        )
    return free


def settings(
    config: TrainConfig, text: Shard | Shards | Examples | Total | RecordSet
) -> dict[str, Any]:
    """Each ``group.field`` of a run, its text's fingerprint, and its initial model."""
    flat: dict[str, Any] = {TEXT: text.corpus.hex()[:12], "init": config.init}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat |= {
                f"{name}.{field}": list(setting) if isinstance(setting, tuple) else setting
                for field, setting in value.items()
            }
    if config.init:
        del flat["data.tokenizer"]  # the initial model's tokenizer is used
    return flat | _resolved(config.model)


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """The model's fields, with their derived values where they were left open."""
    return {f"model.{name}": value for name, value in dataclasses.asdict(model.resolved()).items()}


def is_fixed(field: str) -> bool:
    """Whether this ``group.field`` must not change when a run is resumed."""
    group, _, name = field.partition(".")
    return field in FIXED or (group in FIXED_GROUPS and name not in FIXED_GROUPS[group])


def sequences_a_step(batch_tokens: int, context_length: int, world: World) -> int:
    """The number of sequences in a step, over all processes; ``UsageError`` if the processes cannot
    share them equally.
    """
    sequences = batch_tokens // context_length
    if sequences % world.size:
        least = context_length * world.size
        near = max(1, round(batch_tokens / least)) * least
        raise UsageError(
            f"training.batch_tokens is {batch_tokens}, {sequences} sequences, which {world.size} "
            f"processes cannot share equally; {near} is the nearest that fits"
        )
    return sequences


def write_run_files(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Write the resolved configuration, the tokenizer and what the machine is into the run's
    folder.
    """
    config.run.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run / "tokenizer.json", tokenizers.to_json(tokenizer))
    write_atomically(config.run / "config.toml", to_toml(config))
    machine = json.dumps(describe_machine(), indent=1)
    write_atomically(config.run / "machine.json", machine + "\n")
