"""What follows from the step: the learning rate, as a factor from 0 to 1 for each group's highest
rate, and the limit of attention windows.
"""

import math

from gpt.config import OptimizerConfig, TrainingConfig


def learning_rate_factor(step: int, *, max_steps: int, config: OptimizerConfig) -> float:
    """The factor for ``step`` (from 0): a linear warmup, then cosine, constant, or wsd.

    Cosine (arXiv:1608.03983) falls from the end of the warmup to the floor. Warmup-stable-decay
    (arXiv:2404.06395) stays at 1, then falls linearly over the last ``decay_fraction`` of
    ``max_steps``.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round(max_steps * (1 - config.decay_fraction)))
    left = 1 - min(1.0, max(0, step - start) / max(1, max_steps - start))
    shape = left if config.schedule == "wsd" else 0.5 * (1 - math.cos(math.pi * left))
    return config.floor + (1 - config.floor) * shape


def window_limit(step: int, config: TrainingConfig, *, context_length: int) -> int:
    """The largest attention window for ``step`` (from 0), in tokens; 0: no limit.

    It grows evenly over the first ``window_fraction`` of the steps. All limits are multiples of
    ``window_start``, so that there are few different ones.
    """
    start, growing = config.window_start, round(config.window_fraction * config.max_steps)
    if not start or step >= growing:
        return 0
    return start * (1 + step * (math.ceil(context_length / start) - 1) // growing)
