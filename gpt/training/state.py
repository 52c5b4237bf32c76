"""What resuming needs beside the weights: optimizers, loss scale, random states, the best loss so
far.

The schedule and the place in the data are functions of the step, and need no state. An optimizer's
hyperparameters are the configuration's, not the checkpoint's: what is kept is what it has learned.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from gpt.config import UsageError


def capture(
    optimizers: Sequence[Optimizer],
    scaler: torch.amp.GradScaler,
    *,
    best_loss: float,
    identity: dict[str, str],
) -> dict[str, Any]:
    """The state as tensors and plain values; ``identity`` is what may not change in a run."""
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return {
        "optimizers": [optimizer.state_dict()["state"] for optimizer in optimizers],
        "scaler": scaler.state_dict(),
        "random": random,
        "best_loss": best_loss,
        "identity": identity,
    }


def restore(
    state: dict[str, Any],
    optimizers: Sequence[Optimizer],
    scaler: torch.amp.GradScaler,
    *,
    identity: dict[str, str],
) -> None:
    """Put back what :func:`capture` took; ``UsageError`` if the run is another one by now."""
    for field, value in identity.items():
        if state["identity"][field] != value:
            raise UsageError(
                f"the run was trained with {field} {state['identity'][field]}, and cannot be "
                f"resumed with {value}"
            )
    for optimizer, learned in zip(optimizers, state["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": learned, "param_groups": groups})
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])
