"""Scheduled sampling."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gpt.config import TrainingConfig
from gpt.data.batches import IGNORED, Batch
from gpt.data.prepare import prepare
from gpt.training.loop import Trainer
from gpt.training.parallel import World
from gpt.training.run import train
from gpt.training.scheduled import SCHEDULES, Mixed, ScheduledSampling, mixed, scheduled, share_of
from gpt.training.source import next_token
from tests.tiny import change, tiny_run


@pytest.fixture
def config(text_file, tmp_path):
    return tiny_run(tmp_path, text_file)


def trainer_of(config):
    data = prepare(config.data, config.cache_dir)
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    return Trainer(dataclasses.replace(config, model=model), data)


def settings(schedule, start=0.0):
    return TrainingConfig(
        max_steps=101,
        scheduled_sampling=0.5,
        scheduled_sampling_schedule=schedule,
        scheduled_sampling_start=start,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_share_never_falls_and_ends_at_its_highest_value(schedule):
    shares = [share_of(step, settings(schedule, start=0.1)) for step in range(101)]
    assert shares[:11] == [0.0] * 11
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.5)
    assert share_of(100, settings(schedule)) == pytest.approx(0.5)


def test_the_schedules_have_their_shapes():
    shares = {name: share_of(50, settings(name)) for name in SCHEDULES}
    assert shares == pytest.approx({"linear": 0.25, "sigmoid": 0.25, "constant": 0.5})
    assert share_of(20, settings("sigmoid")) < share_of(20, settings("linear")) / 2


def test_a_share_of_0_is_teacher_forcing_bit_for_bit_with_one_pass(config):
    plain = trainer_of(config)
    late = change(config, training={"scheduled_sampling": 0.5, "scheduled_sampling_start": 0.9})
    other, passes = trainer_of(late), []
    other.model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(2):
        assert plain.update()[:2] == other.update()[:2]
    pairs = zip(plain.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert len(passes) == 4  # two micro batches a step
    assert trainer_of(config).objective is next_token


def test_the_share_of_tokens_is_replaced_by_draws_from_the_position_before():
    draws = torch.Generator().manual_seed(0)
    B, T, V, share = 40, 50, 7, 0.4
    tokens = torch.randint(V, (B, T), generator=draws)
    logits = torch.randn(T, V, generator=draws).expand(B, T, V) * 2
    numbers = torch.rand(B, T, generator=draws)
    new = mixed(tokens, logits, numbers, share)
    assert torch.equal(new[:, 0], tokens[:, 0])
    assert torch.equal(new[:, 1:][numbers[:, 1:] >= share], tokens[:, 1:][numbers[:, 1:] >= share])
    certain = torch.full((T, V), -99.0).scatter(1, (torch.arange(T) % V)[:, None], 99.0)
    new = mixed(tokens, certain.expand(B, T, V), numbers, share)
    replaced = numbers[:, 1:] < share
    assert 0.35 < replaced.float().mean() < 0.45
    wanted = (torch.arange(T - 1) % V).expand(B, T - 1)
    assert torch.equal(new[:, 1:][replaced], wanted[replaced])


def test_the_draws_have_the_models_probabilities():
    n, probabilities = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    numbers = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    logits = probabilities.log().expand(n, 2, 4)
    new = mixed(torch.full((n, 2), 9), logits, numbers, 0.5)[:, 1]
    drawn = new[new != 9]
    assert len(drawn) / n == pytest.approx(0.5, abs=0.01)
    found = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(found, probabilities, atol=0.015, rtol=0)


def forward_of(model):
    """A forward of a model whose features are its logits."""
    head = SimpleNamespace(weight=torch.empty(2, 2, requires_grad=True))
    whole = SimpleNamespace(pointer=None, head=head, logits=lambda features: features * 1.0)

    def forward(ids, documents, read=None):
        return model(ids) * 1.0 if read is None else read(whole, model(ids))

    return forward


def test_the_loss_is_that_of_the_texts_next_tokens_after_the_mixture():
    torch.manual_seed(0)
    table = torch.randn(5, 5, requires_grad=True)
    tokens, targets, numbers = torch.randint(5, (3, 8)), torch.randint(5, (3, 8)), torch.rand(3, 8)
    forward = forward_of(lambda ids: table[ids])
    loss = scheduled(forward, Mixed(Batch(tokens, targets), numbers, 0.6))
    [slope] = torch.autograd.grad(loss, table)
    with torch.no_grad():
        new = mixed(tokens, table[tokens], numbers, 0.6)
    assert not torch.equal(new, tokens)
    wanted = torch.nn.functional.cross_entropy(
        table[new].flatten(0, 1), targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted, table)[0])


def test_tokens_of_prompts_are_never_replaced():
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    targets = torch.tensor([[IGNORED, IGNORED, 0, 0, IGNORED, 0]])  # tokens 3, 4 and 6 are learned
    read = []

    def model(ids):
        read.append(ids)
        return torch.tensor([0.0, 9.0]).repeat(1, 6, 1).requires_grad_()  # a 1

    scheduled(forward_of(model), Mixed(Batch(tokens, targets), torch.full((1, 6), 0.5), 0.9))
    assert read[0].tolist() == [[0, 0, 0, 0, 0, 0]]
    assert read[1].tolist() == [[0, 0, 0, 1, 1, 0]]


def test_the_first_token_of_a_packed_document_is_never_replaced():
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    read = []

    def model(ids):
        read.append(ids)
        return torch.tensor([0.0, 9.0]).repeat(1, 6, 1).requires_grad_()  # a 1

    batch = Batch(tokens, torch.zeros_like(tokens), documents)
    scheduled(forward_of(model), Mixed(batch, torch.full((1, 6), 0.5), 0.9))
    assert read[1].tolist() == [[0, 1, 1, 0, 1, 1]]


def test_the_draws_depend_on_seed_and_step_and_not_on_how_processes_share_it(config):
    source = trainer_of(config).source
    training = dataclasses.replace(config.training, scheduled_sampling=0.5)
    whole = ScheduledSampling(source, training).batch(5, World())
    parts = [ScheduledSampling(source, training).batch(5, World(rank, 2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.numbers for part in parts]), whole.numbers)
    again = ScheduledSampling(source, training).batch(5, World())
    assert torch.equal(again.numbers, whole.numbers)
    assert not torch.equal(
        ScheduledSampling(source, training).batch(6, World()).numbers, whole.numbers
    )
    other = dataclasses.replace(training, seed=4)
    assert not torch.equal(
        ScheduledSampling(source, other).batch(5, World()).numbers, whole.numbers
    )


def test_a_run_with_scheduled_sampling_learns_and_micro_batches_change_nothing(config):
    gradients = []
    for size in (2, 8):
        training = {"micro_batch_size": size, "scheduled_sampling": 0.5}
        trainer = trainer_of(change(config, training=training))
        trainer.step = 6
        gradients.append(trainer.gradients())
    assert gradients[0].norm == pytest.approx(gradients[1].norm, rel=1e-5)
    trainer = trainer_of(change(config, training={"scheduled_sampling": 0.3, "max_steps": 40}))
    losses = [trainer.update().loss for _ in range(40)]
    assert losses[-1] < losses[0] - 0.4


def test_a_resumed_run_with_scheduled_sampling_is_the_uninterrupted_one_bit_for_bit(config):
    training = {"scheduled_sampling": 0.5, "scheduled_sampling_schedule": "constant"}
    config = change(config, training=training, checkpoint={"keep": 9})
    train(config, console=Console(quiet=True))
    [last] = (config.run / "checkpoints").glob("step-00000012")
    weights = (last / "model.safetensors").read_bytes()
    for path in (config.run / "checkpoints").glob("step-000000[01][82]"):
        (path / "meta.json").unlink()  # as if it had been killed while it wrote them
    train(dataclasses.replace(config, resume=True), console=Console(quiet=True))
    assert (last / "model.safetensors").read_bytes() == weights
