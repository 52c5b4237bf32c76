"""torch.compile, where it is asked for or pays."""

import subprocess
from collections.abc import Callable
from typing import Literal

import torch

from gpt.config import UsageError
from gpt.model.gpt import GPT


def compile_blocks(
    model: GPT,
    mode: Literal["auto", "on", "off"],
    *,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Compile each block, in place: one block's graph serves them all, and what shares out the
    weights can come between them.

    ``auto`` compiles on CUDA; where no compiler works it says so and goes on without. On a CPU
    compiling made training slower, so there it is left to ``on``, which raises ``UsageError``
    instead.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if mode == "on":
            raise UsageError(
                f"training.compile is on, and torch.compile does not work here: {reason}"
            ) from error
        say(f"torch.compile does not work here ({reason}); training goes on without it")
        return
    for block in model.blocks:
        block.compile()
