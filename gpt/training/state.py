"""What resuming needs beside the weights: what the optimizers have learned, by parameter, and the
loss scale.

The schedule, the place in the data and the random state are functions of the step, and need no
state. An optimizer's hyperparameters are the configuration's, not the checkpoint's.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.checkpoint import Checkpoint
from gpt.config import UsageError, foreign, quoted


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's random state to that of ``step`` on the process ``rank``.

    So dropout draws the same numbers whatever came before the step: a resumed run, an evaluation.
    """
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def learned(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as ``parameter/name``: the tensors themselves."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    scaler: torch.amp.GradScaler,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """Load the weights and the state of the optimizers and the scaler; of sharded tensors, each
    process reads its own part. Returns the rest of the progress: ``best``, ``best_loss``,
    ``losses``, ``skipped``, ``overflows``.
    """
    parameters = dict(model.named_parameters())
    weights = checkpoint.path / checkpoints.MODEL
    checkpoints.check_fit(checkpoint, tensors.describe(weights), parameters)
    tensors.read(weights, {name: parameter.detach() for name, parameter in parameters.items()})
    if checkpoint.format == 1:
        old = checkpoints.load_format_1(checkpoint)
        saved, progress = from_format_1(old, names_of(model, optimizers))
    else:
        saved, progress = {}, checkpoint.progress
        path = checkpoint.path / checkpoints.TRAINING
        for name, like in tensors.describe(path).items():
            parameter = parameters[name.rpartition("/")[0]]
            # of the parameter's shape, it is laid out and shared out like it
            same = like.shape == parameter.shape
            saved[name] = (
                torch.empty_like(parameter, dtype=like.dtype, requires_grad=False)
                if same
                else torch.empty_like(like, device="cpu")
            )
        tensors.read(path, saved)
    for optimizer, names in zip(optimizers, names_of(model, optimizers), strict=True):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            parameter_name, _, key = name.rpartition("/")
            if parameter_name in names:
                state.setdefault(names.index(parameter_name), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    progress = _checked(progress, checkpoint.path)
    if progress["scaler"]:  # the run had one
        scaler.load_state_dict(progress["scaler"])
    return progress


def _checked(progress: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The progress with every field of its type; what older checkpoints lack is added."""
    number = int | float
    kinds: dict[str, Any] = {"best": str | None, "best_loss": number | None, "losses": list}
    kinds |= {"least_loss": number | None, "skipped": int, "overflows": int, "scaler": dict}
    kinds |= {"settings": dict, "place": dict}
    known: dict[str, Any] = {"settings": {}, "place": {}, "least_loss": progress.get("best_loss")}
    known |= progress
    for name, kind in kinds.items():
        if not isinstance(known.get(name), kind) or (name not in known):
            raise UsageError(
                f"the checkpoint {foreign(path)} cannot be resumed: its progress has "
                f"{quoted(known.get(name))} as {name}"
            )
    if not all(isinstance(loss, number) for loss in known["losses"]):
        raise UsageError(
            f"the checkpoint {foreign(path)} cannot be resumed: its losses are no numbers"
        )
    for name in ("best_loss", "least_loss"):
        known[name] = math.inf if known[name] is None else known[name]
    return known


def names_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[str]]:
    """The names of each optimizer's parameters, in its order."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return [
        [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        for optimizer in optimizers
    ]


def from_format_1(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Format 1 had each optimizer's state by the parameter's number, and did not say which
    checkpoint was the best.
    """
    learned = {
        f"{of[number]}/{key}": value
        for of, state in zip(names, saved["optimizers"], strict=True)
        for number, values in state.items()
        for key, value in values.items()
    }
    progress = {
        "best": None,
        "best_loss": saved["best_loss"],
        "losses": [],
        "skipped": 0,
        "overflows": 0,
        "scaler": saved["scaler"],
    }
    return learned, progress
