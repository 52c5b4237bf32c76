"""The time of each part of a step, and on request a trace of some steps."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Measures the seconds of each part of a step.

    On CUDA it is the GPU's time between two events; only :meth:`take` waits for them. ``data`` runs
    on the host, so it is always the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """A context whose time counts for ``part``."""
        if self._on_gpu and part != "data":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - begin

    def take(self, n_steps: int) -> dict[str, float]:
        """Seconds per step of each part over the ``n_steps`` since the last call, as
        ``data_seconds`` etc.
        """
        if self._events:
            torch.cuda.synchronize()
        for part, start, end in self._events:
            self._seconds[part] += start.elapsed_time(end) / 1000
        seconds = {f"{part}_seconds": self._seconds[part] / n_steps for part in PARTS}
        for part in PARTS:
            self._total[part] += self._seconds[part]
        self._steps += n_steps
        self._events, self._seconds = [], defaultdict(float)
        return seconds

    def summary(self) -> list[str]:
        """A line about the mean step so far; empty if there was no step."""
        whole = sum(self._total.values())
        if not whole:
            return []
        shares = ", ".join(f"{part} {self._total[part] / whole:.0%}" for part in PARTS)
        return [f"a step took {1000 * whole / self._steps:.1f} ms: {shares}"]


class Trace:
    """Runs torch.profiler for ``n_steps`` steps after two warmup steps, and writes ``path``; a
    no-op if ``n_steps`` is 0.
    """

    WARMUP = 2

    def __init__(self, path: Path, n_steps: int, *, device: torch.device) -> None:
        self.path, self._active = path, n_steps
        self._left = n_steps + self.WARMUP if n_steps else 0
        self._profiler: Any = None
        if not n_steps:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=1, warmup=self.WARMUP - 1, active=n_steps),
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def step(self) -> bool:
        """Count a step. Returns whether the trace was written now."""
        if self._left == 0:
            return False
        self._profiler.step()
        self._left -= 1
        if self._left == 0:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Write the trace so far, unless it was written already."""
        if self._profiler is not None:
            self._profiler.stop()
            if self._left < self._active:
                self._profiler.export_chrome_trace(str(self.path))
            self._profiler, self._left = None, 0


class Forecast:
    """Estimates once how long a run will take: after a second of steps and one evaluation."""

    def __init__(self, *, steps: int, evaluations: int, evaluation_seconds: float | None) -> None:
        """``steps`` and ``evaluations`` are those that remain. One evaluation takes
        ``evaluation_seconds``, or ``None`` if a resumed run has not measured it yet.
        """
        self.steps, self.evaluations = steps, evaluations
        self.evaluation_seconds = evaluation_seconds
        self.timed, self.seconds = -1, 0.0  # the first step warms up and is not timed
        self.told = False

    def add(self, seconds: float) -> str | None:
        """Count a step. Returns the estimate as a sentence, once. The mean excludes the first step,
        which warms up.
        """
        if self.told:
            return None
        self.timed += 1
        if self.timed:
            self.seconds += seconds
        if self.seconds < 1 or self.evaluation_seconds is None:
            return None
        self.told = True
        left = self.steps * self.seconds / self.timed + self.evaluations * self.evaluation_seconds
        if left < 90:
            return f"this run takes about {left:.0f} seconds on this machine"
        hours, minutes = divmod(max(1, round(left / 60)), 60)
        length = f"{hours} h {minutes} min" if hours else f"{minutes} minutes"
        return f"this run takes about {length} on this machine"

    def evaluated(self, seconds: float) -> None:
        """Set the seconds of an evaluation, if they are not known yet."""
        if self.evaluation_seconds is None:
            self.evaluation_seconds = seconds
