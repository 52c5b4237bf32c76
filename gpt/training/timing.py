"""The time of a training step on this machine, measured in some seconds before there is a run."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from gpt.config import TrainConfig
from gpt.device import choose_precision
from gpt.model.gpt import GPT
from gpt.speed import product_flops
from gpt.training.footprint import Planner
from gpt.training.rehearsal import Rehearsal

SHARE = 0.5
"""The part of the speed of large products that a step reaches at least; only to choose what is
measured."""
CALLS = 4
"""A warm-up and three that count."""


class StepTime(NamedTuple):
    """Seconds of the parts of a step."""

    micro_batch: float
    """Forward and backward pass of a micro batch."""
    evaluation: float
    """A forward pass of a micro batch without gradients."""
    update: float
    how: str
    """What was measured."""


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
    fast = choose_precision("auto", device)
    rate = SHARE * product_flops(dtype, device)

    def fits(layers: int, n: int) -> bool:
        flops = _flops(config, layers) * n * config.model.context_length
        return CALLS * flops / rate <= seconds and planner.at(layers, n).peak <= free

    def run(layers: int, n: int, share: float) -> StepTime:
        step = Rehearsal(config, n_layer=layers, device=device, dtype=dtype, fast=fast)
        return _timed(step, n, seconds * share)

    if fits(n_layer, rows):
        return run(n_layer, rows, 1.0)
    if fits(n_layer, 1):
        return _scaled(run(n_layer, 1, 1.0), rows, "one sequence at a time")
    start = p + n_layer % p
    if n_layer <= 2 * p or not planner.at(start + p, 1).peak <= free:
        return None
    one, two = (run(start + n * p, 1, 0.5) for n in (0, 1))
    more = (n_layer - start) / p
    micro, evaluation, update = (a + more * (b - a) for a, b in zip(one[:3], two[:3], strict=True))
    how = f"one sequence at a time in {start} and {start + p} of the {n_layer} layers"
    return _scaled(StepTime(micro, evaluation, update, ""), rows, how)


def _flops(config: TrainConfig, n_layer: int) -> float:
    """Of a token, forward and backward."""
    with torch.device("meta"):
        return GPT(dataclasses.replace(config.model, n_layer=n_layer)).flops_per_token()


def _scaled(time: StepTime, rows: int, how: str) -> StepTime:
    return StepTime(rows * time.micro_batch, rows * time.evaluation, time.update, how)


def _timed(step: Rehearsal, rows: int, seconds: float) -> StepTime:
    """Medians over about ``seconds``."""
    passes: list[float] = []
    forwards: list[float] = []
    updates: list[float] = []

    def without_gradients() -> None:
        with torch.no_grad():
            step.forward(rows)

    end = time.perf_counter() + seconds
    while len(passes) < CALLS or time.perf_counter() < end:
        passes.append(_seconds(lambda: step.forward(rows).backward(), step.device))
        if len(updates) < CALLS or len(passes) % 4 == 0:
            updates.append(_seconds(step.update, step.device))
            forwards.append(_seconds(without_gradients, step.device))
        if time.perf_counter() > end and len(passes) > 1:
            break
    micro, evaluation, update = (
        statistics.median(each[1:] or each) for each in (passes, forwards, updates)
    )
    return StepTime(micro, evaluation, update, "the whole model")


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
