"""torch.compile, if the user asks for it or it makes training faster."""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import torch

from gpt.config import UsageError
from gpt.model.gpt import GPT
from gpt.model.moe import MoE


def compile_blocks(
    model: GPT,
    mode: Literal["auto", "on", "off", "whole"],
    *,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Compile each block, in place: all blocks share one graph, and a strategy can shard the model
    block by block. With ``whole``, compile the model's forward pass together with the loss that
    ``read`` computes.

    ``auto`` compiles on CUDA, and says so if the compiler does not work. On a CPU, compiling made
    training slower, so only ``on`` and ``whole`` compile there. They raise ``UsageError`` if the
    compiler does not work.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if mode != "auto":
            raise UsageError(
                f"training.compile is {mode}, and torch.compile does not work here: {reason}"
            ) from error
        say(f"torch.compile does not work here ({reason}); training continues without it")
        return
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.compute_eagerly()
        if mode != "whole":
            block.compile()
    if mode == "whole":
        model.compile()


def uncompiled() -> contextlib.AbstractContextManager[None]:
    """A context in which compiled modules run as they are written. It does not import the compiler,
    which needs 150 MB, if nothing has been compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
