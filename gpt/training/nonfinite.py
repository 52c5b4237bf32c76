"""Losses, gradients and weights that are not finite: found before they change anything."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SHOWN = 5


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each parameter's gradient, by name. If gradients are sharded, all processes must
    call this.
    """
    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this process's parts of the tensors have only finite numbers."""
    here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    return bool(torch.stack([t.detach().isfinite().all() for t in here]).all())


def report(
    run: Path,
    *,
    step: int,
    loss: float,
    norms: Mapping[str, float],
    windows: Sequence[int],
    write: bool,
) -> str:
    """A sentence about the failed step. It names a file with the details, which this process
    writes if ``write`` is set.
    """
    largest = sorted(norms.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)
    path = run / f"nonfinite-{step:08d}.json"
    if write:
        everything = {
            "step": step,
            "loss": str(loss),
            "gradient_norms": {name: str(norm) for name, norm in largest},
            "windows": list(windows),
        }
        path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    named = ", ".join(f"{name} {norm:.3g}" for name, norm in largest[:SHOWN])
    return (
        f"the loss is {loss:.4g} and the largest gradients are {named} at step {step}, "
        f"with the windows {some(windows)} in its batch (details in {path})"
    )


def some(windows: Sequence[int]) -> str:
    """The first window numbers, and how many more follow."""
    more = f" and {len(windows) - SHOWN} more" if len(windows) > SHOWN else ""
    return ", ".join(str(window) for window in windows[:SHOWN]) + more
