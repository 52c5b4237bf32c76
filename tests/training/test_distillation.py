"""Runs that learn what other models predict."""

import dataclasses
import io
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file

from gpt import checkpoint as checkpoints
from gpt.config import ObjectiveConfig, UsageError
from gpt.data.batches import IGNORED, Batch
from gpt.data.prepare import prepare
from gpt.interop.load import load
from gpt.model.gpt import GPT
from gpt.training import loss, setup
from gpt.training.distillation import Distillation, load_teachers
from gpt.training.loop import Trainer
from gpt.training.run import train
from gpt.training.source import next_token
from tests.conftest import make_model
from tests.tiny import change, interrupted_before, tiny_run


def objective(teachers, **fields):
    config = ObjectiveConfig(**{f"distill_{name}": value for name, value in fields.items()})
    return Distillation(teachers, config, device=torch.device("cpu"))


def some_batch():
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(61, (2, 9), generator=generator) for _ in range(2))
    targets[0, 4:6] = IGNORED
    return Batch(tokens, targets)


def gradients(model, make_loss):
    model.zero_grad()
    loss = make_loss(
        lambda tokens, documents=None, read=None: model(tokens, documents=documents, read=read)
    )
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (1.0, 0.7), (0.5, 1.0)])
def test_the_loss_is_its_formula(weight, temperature, in_chunks, tiny_config, monkeypatch):
    if in_chunks:
        monkeypatch.setattr(loss, "MIN_POSITIONS_PER_FEATURE", 0)
        monkeypatch.setattr(loss, "MULTIPLE", 4)
        monkeypatch.setattr(loss, "LOGITS", {"cpu": 5 * tiny_config.vocab_size})
    positions = []
    student, *teachers = (make_model(tiny_config, seed=seed) for seed in (1, 2, 3))
    batch = some_batch()

    def expected(forward):
        logits = forward(batch.tokens)[batch.targets != IGNORED]
        targets = batch.targets[batch.targets != IGNORED]
        with torch.no_grad():
            taught = [t(batch.tokens)[batch.targets != IGNORED] for t in teachers]
            p = sum((z / temperature).softmax(-1) for z in taught) / len(taught)
        q = (logits / temperature).log_softmax(-1)
        divergence = F.kl_div(q, p, reduction="sum")
        hard = F.cross_entropy(logits, targets, reduction="sum")
        return weight * temperature**2 * divergence + (1 - weight) * hard

    mine = objective(teachers, weight=weight, temperature=temperature)
    probabilities = mine.probabilities
    mine.probabilities = lambda taught: positions.append(len(taught[0])) or probabilities(taught)
    got = gradients(student, lambda forward: mine(forward, batch))
    assert positions == ([4, 4, 4, 4, 2] if in_chunks else [18])
    torch.testing.assert_close(got, gradients(student, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_that_equals_the_student_teaches_nothing(temperature, tiny_config):
    student, teacher = make_model(tiny_config, seed=1), make_model(tiny_config, seed=1)
    mine = objective([teacher], weight=1.0, temperature=temperature)
    loss, found = gradients(student, lambda forward: mine(forward, some_batch()))
    assert abs(loss.item()) < 1e-4
    assert not any(gradient.any() for gradient in found)
    # with the text's own tokens, the gradient is a part of theirs
    half = objective([teacher], weight=0.25, temperature=temperature)
    _, found = gradients(student, lambda forward: half(forward, some_batch()))
    _, plain = gradients(student, lambda forward: next_token(forward, some_batch()))
    for one, two in zip(found, plain, strict=True):
        torch.testing.assert_close(one, 0.75 * two, rtol=1e-4, atol=1e-6)


@pytest.fixture
def taught(text_file, tmp_path):
    """A run that learns from two others."""
    config = tiny_run(tmp_path, text_file, evaluation={"sample_tokens": 0})
    names = []
    for seed in (5, 6):
        other = change(config, training={"seed": seed, "max_steps": 4})
        other = dataclasses.replace(other, run_dir=f"{config.run_dir}-{seed}")
        train(other, console=Console(file=io.StringIO()))
        names.append(str(other.run))
    return change(config, objective={"distill": ",".join(names), "distill_weight": 0.8})


def run(config):
    console = Console(file=io.StringIO(), width=200)
    return train(config, console=console, initial=partial(load, trainable=True))


def test_teachers_compute_in_the_precision_of_the_run_and_leave_autocast_as_it_was(taught):
    data = prepare(taught.data, taught.cache_dir)
    config = setup.resolve(change(taught, training={"precision": "bfloat16"}), data, None)
    teachers = load_teachers(config, data.tokenizer, partial(load, trainable=True))
    trainer = Trainer(config, data, teachers=teachers)
    seen = []
    for layer in (teachers[0].blocks[0].mlp.up, teachers[0].head):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    trainer.update()
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def last(config):
    return load_file(checkpoints.find(config.run, "last").path / "model.safetensors")


def test_a_run_with_teachers_is_resumed_bit_for_bit(taught):
    run(taught)
    other = dataclasses.replace(taught, run_dir=taught.run_dir + "-2")
    with interrupted_before(7):
        run(other)
    run(dataclasses.replace(other, resume=True))
    one, two = last(taught), last(other)
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = map(Path, taught.objective.teachers)
    shutil.rmtree(first)
    shutil.copytree(second, first)  # a teacher of the same name
    said = io.StringIO()
    longer = change(taught, training={"max_steps": taught.training.max_steps + 1})
    console = Console(file=said, width=200)
    initial = partial(load, trainable=True)
    train(dataclasses.replace(longer, resume=True), console=console, initial=initial)
    assert "the teachers have other weights than before" in said.getvalue()
    plain = change(taught, objective={"distill": ""})
    run(dataclasses.replace(plain, run_dir=taught.run_dir + "-plain"))
    three = last(dataclasses.replace(plain, run_dir=taught.run_dir + "-plain"))
    assert not torch.equal(one["embed.weight"], three["embed.weight"])


def test_teachers_need_the_runs_tokenizer_vocabulary_and_context(taught, text_file, tmp_path):
    nothing = change(taught, objective={"distill": str(tmp_path / "nothing")})
    with pytest.raises(UsageError, match="objective.distill: model is .*nothing.*, which is not"):
        run(dataclasses.replace(nothing, run_dir=str(tmp_path / "none")))
    other = change(taught, data={"tokenizer": "byte"}, model={"vocab_size": 0})
    with pytest.raises(UsageError, match="whose tokenizer is not that of the run"):
        run(dataclasses.replace(other, run_dir=str(tmp_path / "bytes")))
    wide = change(taught, model={"vocab_size": 64})
    with pytest.raises(UsageError, match="model.vocab_size is 64, and .* has"):
        run(dataclasses.replace(wide, run_dir=str(tmp_path / "wide")))
    long = change(taught, model={"context_length": 32})
    with pytest.raises(UsageError, match="model.context_length is 32, and .* has 16"):
        run(dataclasses.replace(long, run_dir=str(tmp_path / "long")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distill": "a,,b"}, "must be one or more models with commas"),
        ({"distill": "a", "kind": "dpo"}, "needs objective.kind next_token"),
    ],
)
def test_a_list_of_teachers_that_cannot_be_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        ObjectiveConfig(**fields)


def test_micro_batches_and_masks_change_no_gradient_of_a_run_with_teachers(taught):
    data = prepare(taught.data, taught.cache_dir)
    model = dataclasses.replace(taught.model, vocab_size=data.tokenizer.vocab_size)
    found = []
    for size in (8, 2):
        config = change(taught, training={"micro_batch_size": size})
        config = dataclasses.replace(config, model=model)
        torch.manual_seed(9)
        trainer = Trainer(config, data, teachers=[GPT(model), GPT(model)])
        loss, *_ = trainer.gradients()
        found.append([torch.tensor(loss), *(p.grad.clone() for p in trainer.model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
