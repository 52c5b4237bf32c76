"""torch.compile, where it is asked for or pays."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from gpt.config import UsageError


def compiled(
    model: nn.Module,
    mode: Literal["auto", "on", "off"],
    *,
    device: torch.device,
    say: Callable[[str], None],
) -> nn.Module:
    """The model to call in training: compiled, or itself.

    ``auto`` compiles on CUDA; where no compiler works it says so and goes on without. On a CPU
    compiling made training slower, so there it is left to ``on``, which raises ``UsageError``
    instead.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return model
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if mode == "on":
            raise UsageError(
                f"training.compile is on, and torch.compile does not work here: {reason}"
            ) from error
        say(f"torch.compile does not work here ({reason}); training goes on without it")
        return model
    return torch.compile(model)  # type: ignore[return-value]
