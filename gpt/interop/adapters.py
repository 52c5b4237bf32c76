"""Adapters from disk: the checkpoint of a run that trained one, or a folder of PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.checkpoint import Checkpoint
from gpt.config import AdapterConfig, UsageError, foreign
from gpt.generation.frozen import round_weights
from gpt.interop.peft import is_peft, load_peft
from gpt.model.adapter import adapt, fingerprint
from gpt.model.gpt import GPT


class Recorded(NamedTuple):
    """What a checkpoint says of its adapter."""

    base: str
    """The model under it, as ``--init`` named it."""
    fingerprint: str
    settings: AdapterConfig


def recorded(checkpoint: Checkpoint) -> Recorded | None:
    """The adapter of a checkpoint; ``None`` if it has a whole model."""
    said = checkpoint.progress.get("adapter")
    if said is None:
        return None
    try:
        settings = dict(said["settings"])
        settings["targets"] = tuple(settings["targets"])
        return Recorded(str(said["base"]), str(said["fingerprint"]), AdapterConfig(**settings))
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"the adapter in {foreign(checkpoint.path)} has settings that cannot be read: "
            f"{foreign(error)}"
        ) from None


def add_adapter(
    model: GPT, name: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> AdapterConfig:
    """Add the adapter in the folder ``name`` to the model, in place; returns its settings.

    Where it was trained over rounded weights, the model's are rounded in the same way first.
    ``UsageError`` if there is no adapter, or if it was trained over another model.
    """
    path = Path(name)
    if is_peft(path):
        config, weights = load_peft(path, model)
        adapt(model, config, weights)
        return config
    checkpoint = checkpoints.find(path, "best", say=say) if path.is_dir() else None
    own = recorded(checkpoint) if checkpoint is not None else None
    if checkpoint is None or own is None:
        raise UsageError(
            f"adapter is {foreign(path)}, and must be the folder of a run with an adapter, or one "
            "of PEFT"
        )
    if fingerprint(model) != own.fingerprint:
        raise UsageError(
            f"the adapter in {foreign(checkpoint.path)} was trained over {foreign(own.base)}, and "
            "this model has other weights"
        )
    if own.settings.base in ("bfloat16", "int8", "int4"):
        round_weights(model, own.settings.base)
    adapt(model, own.settings, _weights(checkpoint))
    return own.settings


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return tensors.load(checkpoint.path / checkpoints.MODEL)
