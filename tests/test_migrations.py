import math
from pathlib import Path

import pytest
import torch

from gpt import checkpoint as checkpoints
from gpt import migrations
from gpt.config import OptimizerConfig, TrainingConfig
from gpt.training.averaging import Average
from gpt.training.optimizer import make_optimizers
from gpt.training.state import restore

COMMITTED = Path(__file__).parent / "checkpoints"
"""A tiny run of every version so far."""


@pytest.mark.parametrize("run", sorted(COMMITTED.iterdir()), ids=lambda path: path.name)
def test_a_checkpoint_of_every_version_restores_its_optimizers_and_its_progress(run):
    checkpoint = checkpoints.find(run, "last")
    model = checkpoints.load_model(checkpoint)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.initialise()
    optimizers = make_optimizers(model, OptimizerConfig(name="muon"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    progress = restore(model, optimizers, scaler, Average({}), checkpoint, TrainingConfig())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    state = {p: kept for optimizer in optimizers for p, kept in optimizer.state.items()}
    assert state.keys() == set(model.parameters())
    for parameter, kept in state.items():
        moment = kept.get("momentum_buffer", kept.get("exp_avg"))
        assert moment.shape == parameter.shape
        assert moment.any()
    assert progress["best_loss"] == checkpoint.metrics["validation_loss"]
    assert math.isfinite(progress["least_loss"])
    assert {"losses", "skipped", "overflows", "settings", "place"} <= progress.keys()


def test_format_1_numbers_the_parameters_of_each_optimizer():
    saved = {"optimizers": [{1: {"m": 5}}, {0: {"a": 6, "b": 7}}], "best_loss": 2.0, "scaler": {}}
    names = [["x", "y"], ["z"]]
    state = migrations.optimizer_state_of_format_1(saved, names)
    assert state == {"y/m": 5, "z/a": 6, "z/b": 7}
    assert migrations.progress_of_format_1(saved)["best_loss"] == 2.0


def test_progress_that_is_there_stays_and_what_is_missing_is_added():
    old = {"best_loss": 2.0, "skipped": 3}
    assert migrations.complete_progress(old) == old | {
        "settings": {}, "place": {}, "least_loss": 2.0, "stale": 0,
    }  # fmt: skip
    assert migrations.complete_progress(old | {"least_loss": 1.0})["least_loss"] == 1.0
    assert old == {"best_loss": 2.0, "skipped": 3}
