"""Adapters from disk: the checkpoint of a run that trained one, or a folder of PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.checkpoint import Checkpoint
from gpt.config import AdapterConfig, UsageError, foreign
from gpt.generation.frozen import round_weights
from gpt.interop.peft import is_peft, load_peft
from gpt.model.adapter import adapt, was_trained_over
from gpt.model.gpt import GPT
from gpt.model.surgery import conform


class Recorded(NamedTuple):
    """What a checkpoint says of its adapter."""

    base: str
    """The model under it, as ``--init`` named it."""
    fingerprint: str
    settings: AdapterConfig


class Added(NamedTuple):
    """What was added to a model."""

    settings: AdapterConfig
    checkpoint: Checkpoint | None
    """The adapter's checkpoint; ``None`` for a folder of PEFT."""


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
) -> Added:
    """Add the adapter in the folder ``name`` to the model, in place.

    First the model gets the context, rotary positions and vocabulary that it had in training, and
    where its weights were rounded, they are rounded in the same way. ``UsageError`` if there is no
    adapter, or if it was trained over another model.
    """
    path = Path(name)
    if is_peft(path):
        config, weights = load_peft(path, model)
        adapt(model, config, weights)
        return Added(config, None)
    checkpoint = checkpoints.find(path, "best", say=say) if path.is_dir() else None
    own = recorded(checkpoint) if checkpoint is not None else None
    if checkpoint is None or own is None:
        raise UsageError(
            f"adapter is {foreign(path)}, and must be the folder of a run with an adapter, or one "
            "of PEFT"
        )
    try:
        conform(model, checkpoint.model)
        fits = was_trained_over(model, own.fingerprint)
    except ValueError:  # another context, which this model cannot have
        fits = False
    if not fits:
        raise UsageError(
            f"the adapter in {foreign(checkpoint.path)} was trained over {foreign(own.base)}, and "
            "this model has other weights"
        )
    if own.settings.base in ("bfloat16", "int8", "int4"):
        round_weights(model, own.settings.base)
    adapt(model, own.settings, tensors.load(checkpoint.path / checkpoints.MODEL))
    return Added(own.settings, checkpoint)
