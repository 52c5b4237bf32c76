"""The time and the memory of a training step on this machine, measured in some seconds before there
is a run. The steps run in a new process, because the system only tells the peak memory of a whole
process.
"""

import dataclasses
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.config import ModelConfig, TrainConfig, UsageError
from gpt.device import choose_precision, keep_freed_memory
from gpt.model.gpt import GPT
from gpt.speed import product_flops
from gpt.training.footprint import Planner
from gpt.training.rehearsal import Rehearsal

SHARE = 0.5
"""The part of the speed of large products that a step reaches at least; only to choose what is
measured."""
CALLS = 4
"""A warm-up and three that count; if these take too long, two."""


class StepTime(NamedTuple):
    """Seconds of the parts of a step."""

    micro_batch: float
    """Forward and backward pass of a micro batch."""
    evaluation: float
    """A forward pass of a micro batch without gradients."""
    update: float
    how: str
    """What was measured."""
    overhead: float | None = None
    """Bytes of the process at its peak beyond the counted ones: the allocator leaves gaps, and the
    libraries have memory of their own. ``None`` on a GPU, and where the system does not tell it."""


class _Measurement(NamedTuple):
    """What is measured, and for how long."""

    config: TrainConfig
    n_layer: int
    rows: int
    head: bool
    device: torch.device
    dtype: torch.dtype
    seconds: float
    threads: int


def measure_step(
    config: TrainConfig,
    planner: Planner,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    free: float,
) -> StepTime | None:
    """The parts' times with the run's micro batch. If the whole model takes more than ``seconds``
    or ``free`` bytes, one sequence or fewer layers are measured, and extrapolated; ``None`` if not
    even these fit.
    """
    rows, n_layer, p = config.training.micro_batch_size, config.model.n_layer, planner.period
    rate = SHARE * product_flops(dtype, device)

    def fits(layers: int, n: int, within: float = seconds) -> bool:
        flops = _flops(config, layers) * n * config.model.context_length
        return CALLS * flops / rate <= within and planner.at(layers, n).peak <= free

    def run(layers: int, n: int, share: float, *, head: bool = True) -> StepTime:
        what = config, layers, n, head, device, dtype, seconds * share, torch.get_num_threads()
        time, taken = _in_new_process(_Measurement(*what))
        over = None if taken is None else max(0.0, taken - planner.at(layers, n).peak)
        return time._replace(overhead=over)

    if fits(n_layer, rows):
        return run(n_layer, rows, 1.0)
    if fits(n_layer, 1):
        return _scaled(run(n_layer, 1, 1.0), rows, "one sequence at a time")
    start = p + n_layer % p
    if n_layer <= 2 * p or not planner.at(start + p, 1).peak <= free:
        return None
    # The head may take most of the time of a few layers, so a layer is measured without it.
    some = start + p
    while some + p <= n_layer and fits(some + p, 1, seconds / 2):
        some += p
    whole, body = run(start, 1, 0.5), run(some, 1, 0.5, head=False)
    more = n_layer - start
    micro, evaluation = (a + more * b / some for a, b in zip(whole[:2], body[:2], strict=True))
    update = whole.update + more * max(0.0, body.update - whole.update) / (some - start)
    how = f"one sequence at a time in {some} of the {n_layer} layers, and the head"
    return _scaled(StepTime(micro, evaluation, update, "", whole.overhead), rows, how)


def _flops(config: TrainConfig, n_layer: int) -> float:
    """Of a token, forward and backward."""
    with torch.device("meta"):
        return GPT(dataclasses.replace(config.model, n_layer=n_layer)).flops_per_token()


def _scaled(time: StepTime, rows: int, how: str) -> StepTime:
    micro, evaluation = rows * time.micro_batch, rows * time.evaluation
    return StepTime(micro, evaluation, time.update, how, time.overhead)


def _in_new_process(what: _Measurement) -> tuple[StepTime, float | None]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        try:
            return other.submit(_measure, what).result()
        except BrokenProcessPool as error:
            raise UsageError(
                "the process that measured a step was killed, probably because memory ran out; "
                "try a smaller training.micro_batch_size, or --no_measure"
            ) from error


def _measure(what: _Measurement) -> tuple[StepTime, float | None]:
    """The times, and the bytes by which the process grew at its peak, if they are known."""
    device, dtype = what.device, what.dtype
    torch.set_num_threads(what.threads)
    _warm_up(device, dtype)
    before = _resident("VmRSS")
    keep_freed_memory()
    fast = choose_precision("auto", device)
    step = Rehearsal(what.config, n_layer=what.n_layer, device=device, dtype=dtype, fast=fast)
    time = _timed(step, what.rows, what.seconds, head=what.head)
    peak = _resident("VmHWM")
    if device.type != "cpu" or peak is None or before is None:
        return time, None
    return time, peak - before


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Make a step of a tiny model, so that all that torch loads, compiles and starts at its first
    products and updates is there.
    """
    model = ModelConfig(vocab_size=64, context_length=16, n_layer=1, n_head=1, n_embd=16)
    tiny = Rehearsal(TrainConfig(model=model), n_layer=1, device=device, dtype=dtype, fast=dtype)
    tiny.forward(1).backward()
    tiny.update()


def _resident(what: str) -> float | None:
    """Bytes of the process in memory: now (``VmRSS``), or at most so far (``VmHWM``)."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)
        return 1024.0 * int(found[1]) if found else None
    return None


def _timed(step: Rehearsal, rows: int, seconds: float, *, head: bool) -> StepTime:
    """Medians (of two, the shorter: the other one grew the heap) over about ``seconds``; without
    the head, of a step that leaves it out.
    """
    passes: list[float] = []
    forwards: list[float] = []
    updates: list[float] = []
    copies: list[Tensor] = []

    def without_gradients() -> None:
        with torch.no_grad():
            step.forward(rows, head=head)

    end = time.perf_counter() + seconds
    while len(passes) < 3 or time.perf_counter() < end:
        passes.append(_seconds(lambda: step.forward(rows, head=head).backward(), step.device))
        # There is no update after the second pass, so the third adds to its gradients.
        if len(passes) != 2 and (len(updates) < CALLS or len(passes) % 4 == 0):
            updates.append(_seconds(step.update, step.device))
            forwards.append(_seconds(without_gradients, step.device))
        if not copies:  # alive from here on, as a checkpoint's are
            copies += [t.clone() for t in step.copied(checkpoint=step.device.type == "cpu")]
    micro, evaluation, update = (
        statistics.median_low(each[1:]) for each in (passes, forwards, updates)
    )
    return StepTime(micro, evaluation, update, "the whole model")


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
