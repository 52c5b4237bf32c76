"""Runs that learn from preferences and rewards."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from torch.distributions import Categorical

from gpt.config import ModelConfig, UsageError
from gpt.data.batches import IGNORED
from gpt.data.completions import padded
from gpt.data.prompts import read_prompts
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation import rollout
from gpt.model.adapter import adapter_weights, merge
from gpt.model.gpt import GPT
from gpt.training.dpo import Pairs, dpo_loss
from gpt.training.parallel import World
from gpt.training.records import StartLogits
from gpt.training.rewarded import Rewarded
from tests.training.tasks import (
    KINDS,
    MODEL,
    config_of,
    make_start,
    run,
    start_of,
    trainer_of,
    weights,
    write_records,
)


@pytest.fixture
def folder(tmp_path):
    make_start(tmp_path)
    write_records(tmp_path / "records.jsonl")
    return tmp_path


def elsewhere(config, name):
    return dataclasses.replace(config, run_dir=config.run_dir + name)


def records(config, file="metrics.jsonl"):
    return [json.loads(line) for line in (config.run / file).read_text().splitlines()]


def logprob_by_hand(model, row):
    """That of a completion, alone and token by token, in float64."""
    ids = torch.tensor([[*row.prompt, *row.completion]])
    logprobs = model(ids[:, :-1]).log_softmax(-1)
    start = len(row.prompt)
    return sum(logprobs[0, at - 1, ids[0, at]] for at in range(start, ids.shape[1]))


def test_the_loss_and_gradients_of_dpo_are_those_of_its_formula(folder):
    trainer = trainer_of(config_of(folder, "dpo"))
    task, beta = trainer.task, 0.5
    policy = start_of(trainer.config).double().eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    reference = start_of(trainer.config).double().eval()
    by_hand = copy.deepcopy(policy)
    pairs = task.train[:5]
    total = 0.0
    for chosen, rejected in pairs:  # equation 7 of arXiv:2305.18290
        with torch.no_grad():
            start = [logprob_by_hand(reference, row) for row in (chosen, rejected)]
        now = [logprob_by_hand(by_hand, row) for row in (chosen, rejected)]
        margin = beta * (now[0] - start[0]) - beta * (now[1] - start[1])
        total = total + torch.log(1 + torch.exp(-margin))
    total.backward()

    texts = padded([row for pair in pairs for row in pair])
    starts = [[logprob_by_hand(reference, row).item() for row in pair] for pair in pairs]
    batch = Pairs(texts, torch.tensor(starts, dtype=torch.float64))
    loss = task.objective(policy, batch)
    loss.backward()
    torch.testing.assert_close(loss, total)
    for (name, found), wanted in zip(policy.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=name)
    figures = task.figures
    figures.settle(World())
    assert 0 <= figures.take()["accuracy"] <= 1


def test_the_weight_of_chosen_texts_adds_their_cross_entropy_per_token(folder):
    plain = trainer_of(config_of(folder, "dpo"))
    weighed = trainer_of(config_of(folder, "dpo", objective={"chosen_weight": 0.5}))
    batch = plain.task.batch(0, World())
    added = weighed.task.objective(weighed.logits, batch) - plain.task.objective(
        plain.logits, batch
    )
    rows = [plain.task.train[i][0] for i in plain.task.origin(0)]
    model = start_of(plain.config).eval()
    by_hand = [-logprob_by_hand(model, row) / len(row.completion) for row in rows]
    torch.testing.assert_close(added, 0.5 * sum(by_hand))


def test_smoothed_labels_mix_both_preferences():
    policy, reference = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.25]])
    plain, rewards = dpo_loss(policy, reference, beta=0.2)
    flipped, _ = dpo_loss(policy.flip(1), reference.flip(1), beta=0.2)
    smooth, _ = dpo_loss(policy, reference, beta=0.2, label_smoothing=0.1)
    torch.testing.assert_close(smooth, 0.9 * plain + 0.1 * flipped)
    assert rewards[0].tolist() == pytest.approx([0.1, 0.55])


def test_the_start_model_prefers_nothing(folder):
    trainer = trainer_of(config_of(folder, "dpo"))
    found = trainer.task.evaluate()
    assert found.loss == pytest.approx(math.log(2), abs=1e-5)
    assert abs(found.figures["margin"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_gives_the_uninterrupted_result_bit_for_bit(kind, folder):
    config = config_of(folder, kind, checkpoint={"every": 2, "keep": 9}, log={"every": 3})
    whole = elsewhere(config, "-whole")
    run(whole)
    run(config)
    for name in ("step-00000006", "step-00000007"):
        for path in sorted((config.run / "checkpoints" / name).iterdir()):
            path.unlink()
        (config.run / "checkpoints" / name).rmdir()
    run(dataclasses.replace(config, resume=True))  # from step 4, within a round of 3
    one, other = weights(whole), weights(config)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = ("step", "loss", "reward", "margin", "kl", "entropy", "length", "validation_loss")
    picked = [[[r.get(k) for k in kept] for r in records(c)] for c in (whole, config)]
    assert picked[0] == picked[1]
    if "reward" in kind:
        assert records(whole, "samples.jsonl") == records(config, "samples.jsonl")
        moved = one.get("embed.weight", one.get("blocks.0.attn.out.adapter_b"))
        before = torch.zeros_like(moved) if "adapter" in kind else start_of(config).embed.weight
        assert not torch.equal(moved, before)


@pytest.mark.parametrize("there", [True, False])
def test_a_resumed_dpo_run_reads_the_start_model_or_its_stored_numbers(there, folder):
    config = config_of(folder, "dpo", training={"max_steps": 2})
    run(config)
    [file] = config.run.glob("reference-*.safetensors")
    content = file.read_bytes()
    if there:
        (folder / "start").rename(folder / "gone")
    else:
        file.unlink()
    more = dataclasses.replace(config, resume=True)
    run(dataclasses.replace(more, training=dataclasses.replace(more.training, max_steps=3)))
    assert file.read_bytes() == content


def test_a_reward_that_counts_a_letter_rises(folder):
    (folder / "count.py").write_text("def e(prompt, text, record):\n    return text.count('e')\n")
    config = config_of(
        folder,
        "reward",
        objective={"reward": f"{folder}/count.py:e", "records": 8, "samples": 4},
        training={"max_steps": 40, "micro_batch_size": 32},
        optimizer={"learning_rate": 3e-2},
        log={"every": 5},
    )
    output = run(config)
    rewards = [r["reward"] for r in records(config) if "entropy" in r]
    assert rewards[-1] > rewards[0] + 1
    held_out = [r["reward"] for r in records(config) if "validation_loss" in r]
    assert held_out[-1] > held_out[0] + 1
    assert "reward" in output


def test_the_texts_of_every_step_are_written_with_their_rewards(folder):
    config = config_of(folder, "reward, several updates")
    run(config)
    lines = records(config, "samples.jsonl")
    assert [line["step"] for line in lines] == [1] * 12 + [4] * 12 + [7] * 12
    for line in lines:
        assert line["reward"] == 1 - abs(len(line["text"]) - 5) / 5
        assert 1 <= line["tokens"] <= 6


def test_texts_end_at_a_stop_text(folder):
    (folder / "seen.py").write_text("def f(prompt, text, record):\n    return float('e' in text)\n")
    stop = tuple(chr(i) for i in range(97, 123))
    trainer = trainer_of(config_of(folder, "reward", objective={"stop": stop}))
    model = trainer.model
    with torch.no_grad():  # letters only
        model.head.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight[97:123] = 5.0
    written = trainer.task.write([[65, 66]] * 4, range(4), seed=1)
    assert all(text == "" and len(ids) == 1 for ids, text in written)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_trainable_weights_move(kind, folder):
    config = config_of(folder, kind)
    model = start_of(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    trainer = trainer_of(config, model=model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        trainer.update()
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert all(("adapter_" if "adapter" in kind else "mlp") in name for name in moved)


def test_a_step_depends_on_the_seed_and_its_number(folder):
    def texts(step, **training):
        trainer = trainer_of(config_of(folder, "reward", training=training))
        torch.manual_seed(step + 50)  # which decides nothing
        return trainer.task._written(step, World()).tokens

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)
    assert texts(3) != texts(3, seed=5)


def test_the_samples_of_one_prompt_differ(folder):
    trainer = trainer_of(config_of(folder, "reward", objective={"records": 20}))
    made = trainer.task._written(0, World())
    assert len({tuple(ids) for ids in made.tokens}) > len(made.tokens) / 2


def first_letter(prompt, text, record):
    """A reward that each of 257 tokens has, as a text of its own."""
    return ord(text[0]) / 100 if text[:1].isascii() and text else 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradient_of_texts_that_are_written_is_that_of_their_mean_reward(temperature, folder):
    """Texts of one token, whose mean reward is a sum over the vocabulary. The model has more rows
    than the tokenizer has tokens, and these are never written.
    """
    settings = {"max_new_tokens": 1, "temperature": temperature}
    settings |= {"records": 16, "samples": 8}
    torch.manual_seed(0)
    model = GPT(ModelConfig(**MODEL | {"vocab_size": 280})).eval()
    with torch.no_grad():
        model.embed.weight.mul_(8)  # so that no text is about as likely as another
    trainer = trainer_of(config_of(folder, "reward", objective=settings), model=model)
    task, parameters = trainer.task, list(model.parameters())
    task.reward = first_letter
    texts = [ByteTokenizer().decode_bytes([i]).decode(errors="replace") for i in range(257)]
    rewards = torch.tensor([first_letter("", text, {}) for text in texts])

    mean, entropy = 0.0, 0.0
    for row in task.train:
        logits = model(torch.tensor([row]))[0, -1, :257] / temperature
        mean = mean + logits.softmax(-1) @ rewards / len(task.train)
        entropy += Categorical(logits=logits).entropy().item() / len(task.train)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-mean, parameters)])

    along = []
    for step in range(100):
        batch = task.batch(step, World())
        loss = task.objective(model, batch) / len(batch.texts.tokens)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        along.append((gradient @ exact / exact.square().sum()).item())
    found = torch.tensor(along)
    error = found.std().item() / math.sqrt(len(found))
    assert error < 0.1
    assert found.mean().item() == pytest.approx(1, abs=4 * error)
    task.figures.settle(World())
    assert task.figures.take()["entropy"] == pytest.approx(entropy, abs=0.05)


def test_references_that_are_missing_are_told_before_the_first_step(folder):
    config = config_of(folder, "reward", objective={"reward": "bleu"})
    with pytest.raises(UsageError, match="objective.reward bleu needs a text in .reference."):
        trainer_of(config)


def test_micro_batches_do_not_change_the_gradient(folder):
    found = []
    for size in (1, 5, 12):
        config = config_of(folder, "reward, several updates", training={"micro_batch_size": size})
        trainer = trainer_of(config)
        trainer.update()  # at the same policy, the divergence has no gradient
        trainer.gradients()
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


def test_the_divergence_in_the_reward_lowers_the_advantage_of_unlikely_texts(folder):
    plain = trainer_of(config_of(folder, "reward"))
    weighed = trainer_of(config_of(folder, "reward, divergence in it"))
    for trainer in (plain, weighed):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    one, other = plain.task.batch(0, World()), weighed.task.batch(0, World())
    assert torch.equal(one.texts.tokens, other.texts.tokens)
    assert one.reference is None
    assert other.reference is not None
    rows, k = other.texts, 3
    counted = rows.targets != IGNORED
    models = weighed.model.eval(), start_of(weighed.config).eval()
    with torch.no_grad():
        ratio = sum(
            sign
            * model(rows.tokens)[..., :257]
            .log_softmax(-1)
            .gather(-1, rows.targets.clamp_min(0)[..., None])
            .squeeze(-1)[..., :]
            for sign, model in zip((1, -1), models, strict=True)
        )
    total = (ratio * counted).sum(1).view(-1, k)
    change = -0.1 * (total - total.mean(1, keepdim=True)) * k / (k - 1)
    difference = (other.advantages - one.advantages).view(-1, k)
    torch.testing.assert_close(difference, change, rtol=1e-3, atol=1e-5)


def test_held_out_prompts_are_never_learned_and_stay_held_out(folder):
    path = folder / "records.jsonl"
    config = config_of(folder, "dpo")

    def sides():
        data = read_prompts(config.data, ByteTokenizer(), ("chosen", "rejected"))
        return [{item["prompt"] for item in part.items} for part in (data.train, data.validation)]

    train, held_out = sides()
    assert not train & held_out
    assert min(len(train), len(held_out)) > 0
    with path.open("a") as file:
        for i in range(30):
            line = {"prompt": f"new {i}", "chosen": "a", "rejected": "b"}
            file.write(json.dumps(line) + "\n" + json.dumps(line | {"chosen": "c"}) + "\n")
    train_now, held_out_now = sides()
    assert train <= train_now
    assert held_out <= held_out_now
    assert not train_now & held_out_now


def test_texts_that_do_not_fit_are_cut_and_equal_ones_left_out_and_both_are_counted(folder):
    with (folder / "records.jsonl").open("a") as file:
        for i in range(9):
            file.write(json.dumps({"prompt": f"p{i}", "chosen": "x" * 99, "rejected": "y"}) + "\n")
            file.write(json.dumps({"prompt": f"q{i}", "chosen": "y", "rejected": "y"}) + "\n")
    output = run(config_of(folder, "dpo", training={"max_steps": 1}))
    assert "9 with equal texts left out, 9 texts cut at their end to fit the context" in output


LINES = {
    '{"prompt": "p", "chosen": "a"}': "line 25 has no 'rejected'",
    '{"chosen": "a", "rejected": "b"}': "line 25 has no 'prompt'",
    '{"prompt": "p", "chosen": "", "rejected": "b"}': "line 25 has an empty 'chosen'",
    '{"prompt": "p", "chosen": 3, "rejected": "b"}': "has 3 as its 'chosen', which must be a str",
    '["prompt"]': "line 25 is not an object with fields",
    '{"prompt": ': "line 25 is not JSON",
    '{"prompt": "' + "p" * 25 + '", "chosen": "a", "rejected": "b"}': (
        "has 25 tokens, and model.context_length is 24; shorten the prompt or leave it out"
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_record_is_named(line, folder):
    with (folder / "records.jsonl").open("a") as file:
        file.write(line + "\n")
    config = config_of(folder, "dpo")
    with pytest.raises(UsageError, match=re.escape(LINES[line])):
        run(config)


def test_a_prompt_that_fills_the_context_is_refused_for_rewards_too(folder):
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p" * 25}) + "\n")
    with pytest.raises(UsageError, match="has 25 tokens, and model.context_length is 24"):
        run(config_of(folder, "reward"))


@pytest.mark.parametrize("n", [0, 1])
def test_records_of_fewer_than_two_prompts_are_refused(n, folder):
    write_records(folder / "records.jsonl", n)
    with pytest.raises(UsageError, match=r"no text|has records of 1 different prompts|needs at"):
        run(config_of(folder, "dpo"))


def test_processes_must_share_the_records_equally(folder):
    trainer = trainer_of(config_of(folder, "dpo"))
    with pytest.raises(UsageError, match=r"objective.records is 4, which 3 processes .*; 6 is the"):
        trainer.task.order.check(World(0, 3))


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_an_objective_on_records_needs_a_start_model_and_no_scheduled_sampling(kind, folder):
    config = config_of(folder, kind)
    with pytest.raises(UsageError, match=f"objective.kind is {kind}, and needs init"):
        dataclasses.replace(
            config, init="", model=dataclasses.replace(config.model, context_length=8)
        )
    training = dataclasses.replace(config.training, scheduled_sampling=0.5)
    with pytest.raises(UsageError, match=r"scheduled_sampling is 0.5, and must be 0 with"):
        dataclasses.replace(config, training=training)


def test_the_objective_of_a_run_does_not_change(folder):
    config = config_of(folder, "dpo", training={"max_steps": 1})
    run(config)
    other = dataclasses.replace(config_of(folder, "reward"), resume=True)
    with pytest.raises(UsageError, match="objective.kind was dpo and is reward"):
        run(other)


def test_a_failing_reward_ends_the_run_in_one_sentence(folder):
    (folder / "bad.py").write_text("def f(prompt, text, record):\n    return record['no']\n")
    config = config_of(folder, "reward", objective={"reward": f"{folder}/bad.py:f"})
    with pytest.raises(UsageError, match=r"bad.py line 2: f failed: KeyError: 'no'"):
        run(config)


def test_the_start_model_is_in_memory_only_where_the_divergence_counts(folder):
    for kind, there in (("reward", False), ("reward, several updates", True)):
        trainer = trainer_of(config_of(folder, kind))
        trainer.update()
        assert isinstance(trainer.task, Rewarded)
        assert (trainer.task.start_logits.loaded is not None) == there


@pytest.mark.parametrize("kind", ["dpo of an adapter", "reward of an adapter"])
def test_under_an_adapter_the_start_model_is_the_model_without_it(kind, folder):
    def no_second_model():
        raise AssertionError("the start model was loaded")

    trainer = trainer_of(config_of(folder, kind))
    trainer.task._start = no_second_model
    trainer.task.attach(trainer)
    trainer.update()
    trainer.update()
    tokens = torch.arange(40).view(2, 20)
    trainer.model.eval()
    own, start = trainer.logits(tokens), StartLogits(trainer, no_second_model)(tokens)
    assert torch.equal(start, start_of(trainer.config).eval()(tokens))
    assert (own - start).abs().max() > 1e-4
    if "dpo" in kind:
        stored = trainer.task.reference()
        again = trainer.task._compute(trainer)
        assert all(torch.equal(*both) for both in zip(stored, again, strict=True))


def test_a_model_with_an_adapter_writes_its_own_texts(folder, monkeypatch):
    # the merged model would write in bfloat16 where the processor multiplies it
    monkeypatch.setattr(rollout, "choose_precision", lambda *_: torch.float32)
    trainer = trainer_of(config_of(folder, "reward of an adapter"))
    with torch.no_grad():
        for parameter in adapter_weights(trainer.model).values():
            parameter.add_(0.5)
    written = trainer.task.write([[65, 66]] * 8, range(8), 0)
    merged = copy.deepcopy(trainer.model)
    merge(merged)
    trainer.model = merged
    assert [w.tokens for w in written] == [
        w.tokens for w in trainer.task.write([[65, 66]] * 8, range(8), 0)
    ]
