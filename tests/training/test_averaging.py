"""The average of the weights over the last steps."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gpt import checkpoint as checkpoints
from gpt.config import TrainingConfig
from gpt.data.prepare import prepare
from gpt.interop.load import load
from gpt.training.averaging import Average, is_averaged
from gpt.training.loop import Trainer
from gpt.training.run import train
from tests.tiny import change, interrupted_before, tiny_run

FIELDS = {"average_fraction": 0.5, "average_decay": 0.8}


@pytest.fixture
def config(text_file, tmp_path):
    return tiny_run(tmp_path, text_file, training=FIELDS)


def run(config):
    console = Console(file=io.StringIO(), width=200)
    return train(config, console=console), console.file.getvalue()


def trainer_of(config):
    data = prepare(config.data, config.cache_dir)
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    return Trainer(dataclasses.replace(config, model=model), data)


def saved(config, part):
    return load_file(config.run / "checkpoints" / "step-00000012" / f"{part}.safetensors")


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_average_is_the_mean_and_then_a_moving_average(decay):
    config = TrainingConfig(max_steps=20, average_fraction=0.5, average_decay=decay)
    weight = torch.nn.Parameter(torch.zeros(1))
    average, history, expected = Average({"w": weight}), [], None
    for step in range(1, 21):
        with torch.no_grad():
            weight.fill_(step**2)
        average.update(step, config)
        if step <= 10:
            assert not average.values
            continue
        history.append(float(step**2))
        n = len(history)
        if n <= round(1 / (1 - decay) if decay < 1 else 99):
            expected = sum(history) / n
        else:
            expected = decay * expected + (1 - decay) * history[-1]
        assert average.values["w"].item() == pytest.approx(expected)


def test_there_is_no_average_by_default():
    assert not any(is_averaged(step, TrainingConfig(max_steps=10)) for step in range(11))


def test_evaluations_and_checkpoints_have_the_average_and_training_does_not(config):
    result, _ = run(config)
    plain = trainer_of(change(config, training={"average_fraction": 0.0}))
    history = []
    for step in range(1, 13):
        plain.update()
        if step > 6:
            history.append([p.detach().clone() for p in plain.model.parameters()])
    expected = history[0]
    for n, weights in enumerate(history[1:], 2):
        by = max(1 / n, 0.2)
        expected = [a.lerp(w, by) for a, w in zip(expected, weights, strict=True)]
    model, training = saved(config, "model"), saved(config, "training")
    for (name, raw), average in zip(plain.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(model[name], average)
        assert torch.equal(training[f"{name}/raw"], raw)
    with torch.no_grad():
        for parameter, average in zip(plain.model.parameters(), expected, strict=True):
            parameter.copy_(average)
    last = checkpoints.find(config.run, "last").metrics["validation_loss"]
    assert plain.held_out_loss().loss == pytest.approx(last, rel=1e-5)
    loaded, _ = load(config.run, weights="float32")
    assert loaded.parameter_count() == plain.model.parameter_count()
    assert result.step == 12


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_has_the_uninterrupted_average(stop, config):
    run(config)
    parts = [saved(config, part) for part in ("model", "training")]
    other = dataclasses.replace(config, run_dir=config.run_dir + "-2")
    with interrupted_before(stop + 2):
        run(other)
    run(dataclasses.replace(other, resume=True))
    for one, part in zip(parts, ("model", "training"), strict=True):
        two = saved(other, part)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_without_an_average_continues_from_the_weights(config):
    run(config)
    checkpoint = checkpoints.find(config.run, "last")
    trainer = trainer_of(change(config, training={"average_fraction": 0.0, "max_steps": 13}))
    trainer.resume(checkpoint)
    training = saved(config, "training")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, training[f"{name}/raw"])


def evaluated(trainer):
    """The weights that an evaluation sees."""
    with trainer.average.applied():
        return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("longer", [{"max_steps": 40}, {"average_fraction": 0.0, "max_steps": 14}])
def test_a_continued_run_does_not_evaluate_the_average_of_the_shorter_one(longer, config):
    run(config)
    trainer = trainer_of(change(config, training=longer))
    trainer.resume(checkpoints.find(config.run, "last"))
    for _ in range(2):
        own = [p.detach().clone() for p in trainer.model.parameters()]
        assert all(map(torch.equal, evaluated(trainer), own))
        assert not trainer.average.state()
        trainer.update()


def test_an_average_that_begins_late_is_the_mean_of_what_it_took_in(config):
    late = change(config, training={"average_fraction": 0.0, "max_steps": 9})
    run(late)
    trainer = trainer_of(change(config, training=FIELDS | {"average_decay": 0.99}))
    trainer.resume(checkpoints.find(late.run, "last"))
    taken = []
    for _ in range(3):
        trainer.update()
        taken.append([p.detach().clone() for p in trainer.model.parameters()])
    means = [torch.stack(each).mean(0) for each in zip(*taken, strict=True)]
    for mean, own in zip(means, evaluated(trainer), strict=True):
        torch.testing.assert_close(own, mean)
