"""A run's records, read for ``gpt report``: its settings, machine, curves and samples."""

import dataclasses
import itertools
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign
from gpt.training.metrics import Record, read_record
from gpt.training.stopwatch import PARTS

METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run recorded."""

    name: str
    settings: dict[str, Any]
    """By ``group.field``; empty without a ``config.toml``."""
    machine: dict[str, Any]
    """What ``machine.json`` says; empty without it."""
    steps: list[Record]
    """Records of training steps, with ``seconds`` since the start."""
    evaluations: list[Record]
    """The same of evaluations."""
    skipped: int
    """Updates that were skipped."""

    def axis(self, x: str, record: Record) -> float | None:
        """Where a record stands on the axis ``step``, ``tokens`` or ``time`` (hours)."""
        if x == "time":
            return float(record["seconds"]) / 3600
        found = record.get(x)
        return None if found is None else float(found)


def read_runs(paths: Sequence[str]) -> list[RunData]:
    """The runs, with names that differ; ``UsageError`` for what is no run."""
    found = [_read(Path(path)) for path in paths]
    names = [run.name for run in found]
    if len(set(names)) < len(names):
        names = [str(path).rstrip("/") for path in paths]
    return [dataclasses.replace(run, name=n) for run, n in zip(found, names, strict=True)]


def _read(path: Path) -> RunData:
    metrics = path if path.suffix == ".jsonl" else path / METRICS
    folder = metrics.parent
    try:
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"{foreign(path)} has no records of a run: {foreign(metrics)} cannot be read "
            f"({error.strerror}); give folders such as runs/shakespeare"
        ) from None
    records = [record for line in text.splitlines() if (record := read_record(line)) is not None]
    steps = [each for each in records if "loss" in each]
    evaluations = [each for each in records if "validation_loss" in each]
    if not steps and not evaluations:
        raise UsageError(f"{foreign(metrics)} has no records of steps")
    timed = _timed(steps)
    return RunData(
        folder.resolve().name,
        _settings(folder / "config.toml"),
        _machine(folder / "machine.json"),
        timed,
        [_placed(each, timed) for each in evaluations],
        max((each["skipped"] for each in records if "skipped" in each), default=0),
    )


def _timed(steps: Sequence[Record]) -> list[Record]:
    """The records with the ``seconds`` that all steps so far took, by their own figures."""
    found: list[Record] = []
    seconds = 0.0
    for before, record in itertools.pairwise([{"step": 0, "tokens": 0}, *steps]):
        n = record["step"] - before["step"]
        rate, tokens = record.get("tokens_per_second"), record.get("tokens")
        if rate and tokens is not None and "tokens" in before:
            seconds += max(0, tokens - before["tokens"]) / rate
        else:
            seconds += n * sum(record.get(f"{part}_seconds", 0.0) for part in PARTS)
        found.append({**record, "seconds": seconds})
    return found


def _placed(evaluation: Record, steps: Sequence[Record]) -> Record:
    """The evaluation with the tokens and seconds of the last step before it."""
    before = [each for each in steps if each["step"] <= evaluation["step"]]
    if not before:
        return {"tokens": 0, "seconds": 0.0, **evaluation}
    known: Record = {name: before[-1][name] for name in ("tokens", "seconds") if name in before[-1]}
    return {**known, **evaluation}


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{foreign(path)} cannot be read: {foreign(error)}") from None


def _flat(table: dict[str, Any], group: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in table.items():
        inner = isinstance(value, dict)
        found += _flat(value, f"{group}{name}.") if inner else [(f"{group}{name}", value)]
    return found


def _machine(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
