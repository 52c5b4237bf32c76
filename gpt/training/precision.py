"""Mixed precision: float32 weights, matrix products in a smaller type, and float16's loss scale."""

import contextlib

import torch


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """What the forward runs in: nothing for float32, autocast for the smaller types."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """A scaler that does nothing but for float16, whose gradients would vanish without one."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
