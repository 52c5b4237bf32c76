"""Mixed precision: float32 weights, matrix products in a smaller dtype, float16's loss scale."""

import contextlib

import torch

from gpt.training.parallel import World

WIDTHS = (torch.bfloat16, torch.float16, torch.float32)
"""From the dtype that needs the newest hardware to the one that all hardware has."""


def common_precision(fast: torch.dtype, world: World) -> torch.dtype:
    """The dtype that is fast on all processes; ``fast`` is the one for this process. The machines
    may differ, but all must compute in the same dtype.
    """
    return WIDTHS[world.largest(WIDTHS.index(fast))]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context for the forward pass: no-op for float32, autocast for a smaller dtype."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """A scaler for float16, in which small gradients would vanish; a no-op for other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
