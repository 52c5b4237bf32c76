"""Mixed precision: float32 weights, matrix products in a smaller type, and float16's loss scale."""

import contextlib

import torch

from gpt.training.parallel import World

WIDTHS = (torch.bfloat16, torch.float16, torch.float32)
"""From the one that needs the newest hardware to the one that all have."""


def common_precision(fast: torch.dtype, world: World) -> torch.dtype:
    """The dtype that is fast on all processes, of which this one has ``fast``: their machines may
    differ, and what they compute may not.
    """
    return WIDTHS[world.largest(WIDTHS.index(fast))]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """What the forward runs in: nothing for float32, autocast for the smaller types."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """A scaler that does nothing but for float16, whose gradients would vanish without one."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
