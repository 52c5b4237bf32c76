"""Runs that are planned to take some minutes."""

import dataclasses
import io
import weakref
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gpt import checkpoint as checkpoints
from gpt.config import TrainConfig, UsageError, parse
from gpt.data.prepare import prepare
from gpt.interop.load import load
from gpt.training import budget, setup
from gpt.training.loop import Trainer
from gpt.training.parallel import World
from gpt.training.run import train
from tests.tiny import change, tiny_run


@pytest.fixture
def config(text_file, tmp_path):
    return tiny_run(tmp_path, text_file, model={"dropout": 0.1}, training={"max_minutes": 0.5})


@pytest.fixture
def quick(monkeypatch):
    """Steps and evaluations that seem to take some seconds."""
    measure, shown = budget.measure, []

    def measured(trainer, sample, *, seconds, most):
        assert most == 60 * 0.5
        real = measure(trainer, sample, seconds=0.0, most=most)
        shown.append((trainer.step, seconds, *real))
        return 2.0, 4.0

    monkeypatch.setattr(budget, "measure", measured)
    return shown


def run(config, **options):
    console = Console(file=io.StringIO(), width=200)
    return train(config, console=console, **options), console.file.getvalue()


def last(config):
    return load_file(checkpoints.find(config.run, "last").path / "model.safetensors")


@pytest.mark.parametrize(
    ("seconds", "steps"),
    # two evaluations of 4 s, steps of 2 s, and an evaluation more for each 10 steps
    [(1, 1), (10, 1), (24, 8), (27, 9), (32, 10), (248, 100)],
)
def test_steps_and_evaluations_fit_into_the_time(seconds, steps):
    assert budget.steps_of(seconds, 2.0, 4.0, every=10) == steps


def test_the_measured_model_is_gone_before_the_run_builds_its_own(config, quick, monkeypatch):
    measured, made = [], budget.Trainer
    monkeypatch.setattr(
        budget,
        "Trainer",
        lambda *args, **own: measured.append(made(*args, **own)) or measured[-1],
    )

    def refer(trainer, *args, **own):
        measured[:] = [weakref.ref(trainer.model.blocks[0])]
        return 2.0, 4.0

    monkeypatch.setattr(budget, "measure", refer)
    config = change(config, training={"activation_checkpointing": "full"})
    data = prepare(config.data, config.cache_dir)
    config = setup.resolve(config, data, None)
    budget.plan(config, data, world=World(), model=None, sample=None, say=print)
    assert measured[0]() is None


def test_a_planned_run_is_the_run_of_so_many_steps(config, quick):
    result, output = run(config)
    assert (result.step, quick[0][0], quick[0][1]) == (7, 4, 0.6)
    assert min(quick[0][2:]) > 0
    assert "0.5 minutes are planned as 7 steps: a step takes 2000.0 ms" in output
    other = dataclasses.replace(config, run_dir=config.run_dir + "-plain")
    other = change(other, training={"max_minutes": 0.0, "max_steps": 7})
    run(other)
    one, two = last(config), last(other)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert len(quick) == 1


def test_a_measurement_ends_with_the_time_that_the_run_has(config):
    trainer = trainer_of(config)
    step, _ = budget.measure(trainer, None, seconds=0.0, most=0.0)
    assert trainer.step == 1
    assert step > 0


def test_the_longest_steps_of_a_run_are_measured(config, monkeypatch):
    seen = []
    monkeypatch.setattr(budget, "measure", lambda trainer, *_, **__: seen.append(trainer) or (1, 1))
    training = {
        "window_start": 4, "scheduled_sampling": 0.5, "scheduled_sampling_start": 0.5,
        "max_minutes": 0.05,
    }  # fmt: skip
    run(change(config, training=training))
    [trainer] = seen
    passes = []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.update()
    assert trainer.model.window_limit == 0
    assert len(passes) == 4  # two of each micro batch


def trainer_of(config):
    data = prepare(config.data, config.cache_dir)
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    return Trainer(dataclasses.replace(config, model=model), data)


def test_a_plan_leaves_the_initial_model_as_it_is(config, quick):
    plain = change(config, training={"max_minutes": 0.0, "max_steps": 7})
    run(plain)
    tuned = [
        dataclasses.replace(each, init=str(config.run), run_dir=f"{config.run_dir}-{n}")
        for n, each in enumerate((config, plain))
    ]
    for each in tuned:
        run(each, initial=partial(load, trainable=True))
    one, two = map(last, tuned)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert len(quick) == 1


def test_the_plan_is_written_down_and_kept_when_the_run_is_resumed(config, quick):
    run(config)
    written = parse(TrainConfig, [str(config.run / "config.toml")], prog="train.py").training
    assert (written.max_steps, written.max_minutes) == (7, 0.0)
    for minutes in (0.5, 9.0):
        again = change(config, training={"max_minutes": minutes})
        result, output = run(dataclasses.replace(again, resume=True))
        assert result.step == 7
        assert "this one began with 7 steps" in output
        assert "changed" not in output
    more = change(config, training={"max_minutes": 0.0, "max_steps": 9})
    result, _ = run(dataclasses.replace(more, resume=True))
    assert result.step == 9
    assert len(quick) == 1


def test_minutes_plan_no_other_objective():
    with pytest.raises(UsageError, match="plans runs of objective.kind next_token alone"):
        parse(
            TrainConfig,
            ["--init", "x", "--objective.kind", "dpo", "--training.max_minutes", "5"],
            prog="train.py",
        )
