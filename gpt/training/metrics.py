"""A run's reports: ``metrics.jsonl``, a progress bar or plain lines, and optionally wandb."""

import dataclasses
import json
import math
import os
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpt.config import LogConfig, UsageError
from gpt.files import check_regular, write_atomically

Record = dict[str, Any]
SHOWN = ("reward", "kl", "margin", "accuracy")
"""Figures of tasks that a step's line shows."""
WIDE = 92
"""Columns. Narrower terminals do not show the epoch."""


class Reporter:
    """Writes the records of a run to the file, the terminal, and wandb.

    The run starts from ``first_step``. Later records, which a killed process left in the file, are
    deleted, so that each step is recorded once.
    """

    def __init__(
        self,
        run: Path,
        config: LogConfig,
        *,
        console: Console,
        first_step: int,
        max_steps: int,
        settings: Record,
    ) -> None:
        self._console = console
        self._first_step, self._max_steps = first_step, max_steps
        self._start = time.monotonic()
        self._smooth = Smoothed()
        self._validation = math.nan
        path = run / "metrics.jsonl"
        told = drop_later_records(path, first_step or -1)
        self._sent = told  # including those that a killed process sent after its last checkpoint
        self._wandb = _start_wandb(run, config, settings) if config.wandb != "off" else None
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._progress = Progress(
            BarColumn(bar_width=6),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=max_steps, completed=first_step)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(exception[0] is not None))

    def flush(self) -> None:
        """Wait until all records so far are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def skipped(self, record: Record, what: str) -> None:
        """A skipped update: ``step``, and ``skipped`` so far. ``what`` is the reason."""
        self._write(record)
        self.say(f"step {record['step']:,}: {what}")

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def step(self, record: Record) -> None:
        """A training step: ``step``, ``loss``, ``learning_rate``, ``tokens_per_second``, and if
        known ``epoch`` and ``mfu``.
        """
        self._write(record)
        self._smooth.add(record["loss"])
        parts = self._parts(record)
        if self._console.is_terminal:
            line = " ".join(parts)  # narrow enough for 80 columns
            self._progress.update(self._task, completed=record["step"], description=line)
        else:
            self.say("step " + "  ".join(parts))

    def evaluation(self, record: Record, *, best: bool, sample: str) -> None:
        """An evaluation: ``step``, ``validation_loss``, for a text ``bits_per_byte``, of a mixture
        ``validation_losses`` by source, and perhaps further figures; ``sample`` is a text by the
        model, or empty.
        """
        self._validation = record["validation_loss"]
        self._write(record | ({"sample": sample} if sample else {}))
        further = "".join(
            f", {name.replace('_', ' ')} {value:.4g}"
            for name, value in record.items()
            if name not in ("step", "validation_loss", "bits_per_byte", "validation_losses")
        )
        told = f"loss {self._validation:.4f}"
        if "bits_per_byte" in record:
            told = f"{self._validation:.4f} nats/token, {record['bits_per_byte']:.4f} bits/byte"
        best_so_far = " (best so far)" if best else ""
        self.say(f"step {record['step']:,}: validation {told}{further}{best_so_far}")
        for name, loss in record.get("validation_losses", {}).items():
            self.say(f"  {name}: {loss:.4f} nats/token")
        if sample:
            frame = "|" if self._console.options.ascii_only else "│"
            self._console.print(
                "\n".join(f"  {frame} {line}" for line in sample.splitlines()),
                style="dim",
                highlight=False,
                markup=False,
                emoji=False,
                soft_wrap=True,
            )

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._wandb is not None and _kind(record) not in self._sent:
            self._wandb.log(record)

    def _parts(self, record: Record) -> list[str]:
        step = record["step"]
        elapsed = time.monotonic() - self._start
        left = elapsed / (step - self._first_step) * (self._max_steps - step)
        return [
            f"{step:>{len(str(self._max_steps))}}/{self._max_steps}",
            f"loss {self._smooth.value:.4f}",
            *(f"{name} {record[name]:.3f}" for name in SHOWN if name in record),
            f"val {self._validation:.4f}" if self._validation == self._validation else "val   -   ",
            f"lr {record['learning_rate']:.1e}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            *self._epoch(record),
            *([f"MFU {record['mfu']:.1%}"] if "mfu" in record else []),
            f"{_clock(elapsed)}<{_clock(left)}",
        ]

    def _epoch(self, record: Record) -> list[str]:
        """The epochs so far, if a terminal is wide enough."""
        has_room = not self._console.is_terminal or self._console.width >= WIDE
        return [f"epoch {record['epoch']:.2f}"] if "epoch" in record and has_room else []


class Silent:
    """The reporter of the other processes, which reports nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def flush(self) -> None: ...

    def skipped(self, record: Record, what: str) -> None: ...

    def say(self, text: str) -> None: ...

    def step(self, record: Record) -> None: ...

    def evaluation(self, record: Record, *, best: bool, sample: str) -> None: ...


class Smoothed:
    """An exponential mean with Adam's bias correction."""

    def __init__(self, decay: float = 0.6) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> None:
        """Add a value."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first value."""
        return self._sum / self._weight if self._weight else math.nan


Kind = tuple[int, bool, bool]


def _kind(record: Record) -> Kind:
    """A key that is unique among the records of a run."""
    return record["step"], "validation_loss" in record, "skipped" in record


def read_record(line: str) -> Record | None:
    """The record in a line; ``None`` for a truncated line, or one that this program did not write
    (its ``step`` or a loss is not a number).
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    losses = [record[name] for name in ("loss", "validation_loss") if name in record]
    good = all(type(loss) in (int, float) and math.isfinite(loss) for loss in losses)
    return record if good and 0 <= record["step"] < 2**63 else None


def drop_later_records(path: Path, step: int) -> set[Kind]:
    """Remove records after ``step`` from a metrics file, and truncated or damaged lines. Returns
    the keys of all records that it had.
    """
    if not path.exists():
        return set()
    check_regular(path, "the metrics")
    kept, told = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        record = read_record(line)
        if record is not None and line.endswith("\n"):
            kind = _kind(record)
            told.add(kind)
            kept += [line] if kind[0] <= step else []
    write_atomically(path, "".join(kept))
    return told


def _start_wandb(run: Path, config: LogConfig, settings: Record) -> Any:
    """Start this run's wandb run, or resume it."""
    import wandb

    path = run / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    try:
        started = wandb.init(
            id=path.read_text(encoding="utf-8").strip(),
            resume=None if config.wandb == "offline" else "allow",
            project=config.wandb_project,
            name=run.name,
            dir=run,
            mode="offline" if config.wandb == "offline" else "online",
            config=settings,
            settings=wandb.Settings(silent=True),
        )
        started.define_metric("*", step_metric="step")  # unlike wandb's own step, it may repeat
        return started
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"log.wandb is {config.wandb!r}, and wandb cannot start: {reason}"
        ) from error


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def as_settings(config: Any) -> Record:
    """A configuration as values that JSON can hold."""
    record: Record = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return record
