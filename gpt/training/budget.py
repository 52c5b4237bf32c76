"""The plan of a run that may take some minutes: how many steps fit into them.

A trainer of the same configuration makes a few steps and an evaluation, and is thrown away. What a
step depends on follows from the seed and the step, so the measurement changes nothing in the run.
"""

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.training.loop import Data, Sample, Trainer
from gpt.training.parallel import World

FEWEST, SHARE, MOST_SECONDS = 3, 0.02, 20.0
"""Steps to measure, after one that warms up; the share of the minutes and the seconds that the
measurement takes at most, after these steps."""


def plan(
    config: TrainConfig,
    data: Data,
    *,
    world: World,
    model: GPT | None,
    teachers: Sequence[GPT] = (),
    sample: Sample | None,
    say: Callable[[str], None],
) -> TrainConfig:
    """The configuration with ``max_steps`` that take ``training.max_minutes`` on this machine.
    ``model`` is the one that the run starts from, and stays as it is.
    """
    minutes = config.training.max_minutes
    start = copy.deepcopy(model)
    trainer = Trainer(longest(config), data, world=world, model=start, teachers=teachers)
    enough = min(MOST_SECONDS, 60 * minutes * SHARE)
    step, evaluation = measure(trainer, sample, seconds=enough, most=60 * minutes)
    del trainer, start
    gc.collect()  # it may be in a reference cycle, which would keep its memory during the run
    step, evaluation = world.broadcast(lambda: [step, evaluation])  # those of the main process
    steps = steps_of(60 * minutes, step, evaluation, every=config.evaluation.every)
    say(
        f"{minutes:g} minutes are planned as {steps:,} steps: a step takes {1000 * step:.1f} ms "
        f"and an evaluation {evaluation:.2f} s on this machine"
    )
    training = dataclasses.replace(config.training, max_steps=steps, max_minutes=0.0)
    return dataclasses.replace(config, training=training)


def longest(config: TrainConfig) -> TrainConfig:
    """The configuration with every step as long as the run's longest: with full attention windows
    and, under scheduled sampling, both forward passes.
    """
    training = dataclasses.replace(
        config.training,
        window_start=0,
        scheduled_sampling_schedule="constant",
        scheduled_sampling_start=0.0,
    )
    return dataclasses.replace(config, training=training)


def measure(
    trainer: Trainer, sample: Sample | None, *, seconds: float, most: float
) -> tuple[float, float]:
    """The seconds of a step (the median) and of an evaluation, from ``seconds`` of steps, or more
    for a few of them, up to ``most``. The first step warms up, and counts only if it is all there
    is time for.
    """
    times: list[float] = []
    began = time.monotonic()
    more = True
    while more:
        start = time.monotonic()
        trainer.update()
        times.append(time.monotonic() - start)
        took = time.monotonic() - began
        enough = took >= (seconds if len(times) > FEWEST else most)
        more = not trainer.world.largest(enough)
    start = time.monotonic()
    trainer.held_out_loss()
    if sample is not None:
        trainer.sample(sample)
    return statistics.median(times[1:] or times), time.monotonic() - start


def steps_of(seconds: float, step: float, evaluation: float, *, every: int) -> int:
    """How many steps fit, with an evaluation before the first one, one each ``every`` steps, and
    one after the last; at least 1.
    """
    left = seconds - 2 * evaluation
    without = int(left / step)
    return max(1, without if without < every else int(left / (step + evaluation / every)))
