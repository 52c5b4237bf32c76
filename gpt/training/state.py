"""The state that resuming needs: weights, the optimizers' state by parameter, and the loss scale.

The schedule, the position in the data and the random state are functions of the step and need no
state. An optimizer's hyperparameters come from the configuration, not from the checkpoint.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt import checkpoint as checkpoints
from gpt import migrations, tensors
from gpt.checkpoint import Checkpoint
from gpt.config import TrainingConfig, UsageError, foreign, quoted
from gpt.model.adapter import adapter_weights
from gpt.training.averaging import RAW, Average


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's random state for ``step`` on the process ``rank``.

    So dropout draws the same numbers in a resumed run, or after an evaluation.
    """
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def saved_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by name: the adapter's, or without one, all."""
    return adapter_weights(model) or dict(model.named_parameters())


def learned(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as ``parameter/name``. The tensors are not copied."""
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
    average: Average,
    checkpoint: Checkpoint,
    config: TrainingConfig,
) -> dict[str, Any]:
    """Load the weights and the state of the optimizers, the scaler and the average, in place. Each
    process reads its own shards. Returns the progress: ``best``, ``best_loss``, ``losses``,
    ``skipped``, ...
    """
    parameters = saved_weights(model)
    weights = checkpoint.path / checkpoints.MODEL
    checkpoints.check_fit(checkpoint, tensors.describe(weights), parameters)
    tensors.read(weights, {name: parameter.detach() for name, parameter in parameters.items()})
    if checkpoint.format == 1:
        old = checkpoints.load_format_1(checkpoint)
        saved = migrations.optimizer_state_of_format_1(old, names_of(model, optimizers))
        progress = migrations.progress_of_format_1(old)
    else:
        saved, progress = {}, checkpoint.progress
        path = checkpoint.path / checkpoints.TRAINING
        for name, like in tensors.describe(path).items():
            parameter = parameters[name.rpartition("/")[0]]
            # A tensor of the parameter's shape has its layout and its shards too.
            same = like.shape == parameter.shape
            saved[name] = (
                torch.empty_like(parameter, dtype=like.dtype, requires_grad=False)
                if same
                else torch.empty_like(like, device="cpu")
            )
        tensors.read(path, saved)
    ending = f"/{RAW}"
    raw = {name.removesuffix(ending): saved.pop(name) for name in [*saved] if name.endswith(ending)}
    count = progress.get("averaged")
    average.restore(raw, count if type(count) is int else None, checkpoint.step, config)
    for optimizer, names in zip(optimizers, names_of(model, optimizers), strict=True):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            parameter_name, _, key = name.rpartition("/")
            if parameter_name in names:
                state.setdefault(names.index(parameter_name), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    progress = _checked(migrations.complete_progress(progress), checkpoint.path)
    if progress["scaler"]:  # the run used one
        scaler.load_state_dict(progress["scaler"])
    return progress


def _checked(progress: dict[str, Any], path: Path) -> dict[str, Any]:
    """The progress; ``UsageError`` if a field is missing or has another type."""
    number = int | float
    kinds: dict[str, Any] = {"best": str | None, "best_loss": number | None, "losses": list}
    kinds |= {"least_loss": number | None, "skipped": int, "overflows": int, "scaler": dict}
    kinds |= {"settings": dict, "place": dict, "stale": int}
    for name, kind in kinds.items():
        if not isinstance(progress.get(name), kind) or name not in progress:
            raise UsageError(
                f"the checkpoint {foreign(path)} cannot be resumed: its progress has "
                f"{quoted(progress.get(name))} as {name}"
            )
    if not all(isinstance(loss, number) for loss in progress["losses"]):
        raise UsageError(
            f"the checkpoint {foreign(path)} cannot be resumed: its losses are not numbers"
        )
    for name in ("best_loss", "least_loss"):
        progress[name] = math.inf if progress[name] is None else progress[name]
    return progress


def names_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[str]]:
    """The names of each optimizer's parameters, in the optimizer's order."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return [
        [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        for optimizer in optimizers
    ]
