"""The configuration of a training run that takes a fraction of a second."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gpt.config import (
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from gpt.training.loop import Trainer


def tiny_run(folder: Path, source: Path | str, **groups: dict[str, Any]) -> TrainConfig:
    """Twelve steps on the text ``source``, in ``folder/run``. ``groups`` change fields, by group:
    ``training={"max_steps": 4}``.
    """
    config = TrainConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(vocab_size=0, context_length=16, n_layer=2, n_head=2, n_embd=32),
        data=DataConfig(source=str(source)),
        training=TrainingConfig(
            max_steps=12, batch_tokens=128, micro_batch_size=4, precision="float32", device="cpu"
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        evaluation=EvaluationConfig(every=4, windows=8),
        log=LogConfig(every=2),
    )
    return change(config, **groups)


def change(config: TrainConfig, **groups: dict[str, Any]) -> TrainConfig:
    """The configuration with some fields of some groups changed, at once."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in groups.items()
    }
    return dataclasses.replace(config, **changed)


@contextlib.contextmanager
def interrupted_before(step: int) -> Iterator[None]:
    """A run in this block ends, as with Ctrl-C, instead of the update with this number."""
    update = Trainer.update

    def interrupt(trainer: Trainer) -> Any:
        if trainer.step + 1 == step:
            raise KeyboardInterrupt
        return update(trainer)

    with mock.patch.object(Trainer, "update", interrupt), pytest.raises(KeyboardInterrupt):
        yield
