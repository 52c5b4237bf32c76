import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gpt import checkpoint as checkpoints
from gpt import training_kernels
from gpt.config import (
    TrainConfig,
    UsageError,
    parse,
)
from gpt.data.batches import IGNORED, Batch, TextWindows
from gpt.data.prepare import prepare
from gpt.device import choose_precision
from gpt.interop.load import load
from gpt.model.moe import MoE
from gpt.training.compilation import compile_blocks
from gpt.training.loop import Gradients, Shown, Trainer
from gpt.training.metrics import Silent
from gpt.training.parallel import World
from gpt.training.run import train
from gpt.training.schedule import learning_rate_factor
from gpt.training.setup import FIXED, FIXED_GROUPS, held, is_fixed, settings
from gpt.training.source import next_token
from gpt.training.stopwatch import Forecast
from tests import tiny
from tests.tiny import tiny_run


@pytest.fixture
def config(text_file, tmp_path):
    return tiny_run(tmp_path, text_file, model={"dropout": 0.1})


def change(config, group, **values):
    return tiny.change(config, **{group: values})


def elsewhere(config, name):
    return dataclasses.replace(config, run_dir=config.run_dir + name)


def run(config, **options):
    console = Console(file=io.StringIO(), width=200)
    options = {"initial": partial(load, trainable=True)} | options
    return train(config, console=console, **options), console.file.getvalue()


def records(config):
    return [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]


def weights(config):
    found = checkpoints.find(config.run, "last")
    return dict(checkpoints.load_model(found).named_parameters())


def assert_equal_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def trainer_of(config):
    data = prepare(config.data, config.cache_dir)
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    return Trainer(dataclasses.replace(config, model=model), data)


def resumed_from(checkpoint, config):
    trainer = trainer_of(config)
    trainer.resume(checkpoint)
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(optimizer, config):
    config = change(config, "training", max_steps=60)
    config = change(config, "optimizer", name=optimizer)
    result, _ = run(config)
    losses = [r["loss"] for r in records(config) if "loss" in r]
    assert losses[0] > 3
    assert losses[-1] < losses[0] - 0.8
    assert result.best_loss < 2.7


def test_a_run_writes_the_documented_files(config):
    result, output = run(config)
    assert (result.step, result.signal) == (12, None)
    assert {p.name for p in config.run.iterdir()} == {
        "config.toml", "tokenizer.json", "machine.json", "metrics.jsonl", "checkpoints", "best",
        "last", "data", ".lock",
    }  # fmt: skip
    assert (config.run / "last").read_text() == "step-00000012\n"
    assert [r["step"] for r in records(config) if "loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records(config) if "validation_loss" in r] == [0, 4, 8, 12]
    assert "step 12: validation" in output


def test_a_run_without_a_compiler_says_that_it_is_slower(config, monkeypatch):
    assert not any("slower" in note for note in trainer_of(config).notes)
    monkeypatch.setattr(training_kernels, "problem", lambda: "there is no C++ compiler 'c++'")
    assert any(
        note.startswith("there is no C++ compiler 'c++'; torch's operators run")
        for note in trainer_of(config).notes
    )


def test_the_resolved_configuration_can_be_run_again(config):
    run(config)
    again = parse(TrainConfig, [str(config.run / "config.toml")], prog="train.py")
    assert again.model.vocab_size == prepare(config.data, config.cache_dir).tokenizer.vocab_size
    first = weights(config)
    again = elsewhere(again, "-again")
    run(again)
    assert_equal_weights(weights(again), first)


def test_the_same_seed_gives_a_bit_identical_run_and_another_seed_does_not(config):
    run(config)
    same = elsewhere(config, "-same")
    run(same)
    assert_equal_weights(weights(config), weights(same))
    keys = ("step", "loss", "validation_loss", "gradient_norm")
    pick = lambda c: [[r.get(k) for k in keys] for r in records(c)]  # noqa: E731
    assert pick(config) == pick(same)
    other = elsewhere(change(config, "training", seed=1), "-other")
    run(other)
    assert not torch.equal(weights(config)["embed.weight"], weights(other)["embed.weight"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_gives_the_uninterrupted_result(optimizer, config):
    config = change(config, "optimizer", name=optimizer, schedule="constant")
    whole = elsewhere(config, "-whole")
    run(whole)
    run(change(config, "training", max_steps=8))
    resumed = dataclasses.replace(config, resume=True)
    result, output = run(resumed)
    assert result.step == 12
    assert "continuing from step 8" in output
    assert_equal_weights(weights(config), weights(whole))
    assert [r["step"] for r in records(config)] == [r["step"] for r in records(whole)]
    assert records(config)[-1]["validation_loss"] == records(whole)[-1]["validation_loss"]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_changes_no_gradient(micro_batch_size, config):
    config = change(config, "model", dropout=0.0)
    config = change(config, "training", gradient_clip=0.0)

    def gradients(size):
        trainer = trainer_of(change(config, "training", micro_batch_size=size))
        loss, *_ = trainer.gradients()
        return loss, {n: p.grad for n, p in trainer.model.named_parameters()}

    whole_loss, whole = gradients(8)
    loss, split = gradients(micro_batch_size)
    torch.testing.assert_close(loss, whole_loss)
    for name in whole:
        error = (split[name] - whole[name]).norm() / whole[name].norm()
        assert error < 1e-5, name


def test_the_reported_loss_is_the_mean_over_the_steps_tokens(config):
    trainer = trainer_of(change(config, "model", dropout=0.0))
    batch = trainer.source.batch(0, trainer.world)
    logits = trainer.model(batch.tokens).detach().double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert trainer.update()[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_smaller_precisions_train_with_float32_weights(precision, config):
    config = change(config, "training", precision=precision, max_steps=60)
    run(config)
    assert {p.dtype for p in weights(config).values()} == {torch.float32}
    losses = [r["loss"] for r in records(config) if "loss" in r]
    assert losses[-1] < losses[0] - 0.5


def test_best_names_the_checkpoint_with_the_lowest_validation_loss(config):
    config = change(config, "optimizer", learning_rate=0.3, schedule="constant")  # it gets worse
    config = change(config, "checkpoint", keep=1)
    result, _ = run(config)
    evaluations = [r for r in records(config) if "validation_loss" in r and r["step"]]
    best = min(evaluations, key=lambda r: r["validation_loss"])
    assert checkpoints.find(config.run, "best").step == best["step"]
    assert result.best_loss == best["validation_loss"]
    assert checkpoints.find(config.run, "last").step == 12


def test_checkpoint_every_writes_checkpoints_between_evaluations(config):
    config = change(config, "checkpoint", every=3, keep=9)
    run(config)
    names = sorted(p.name for p in (config.run / "checkpoints").iterdir())
    assert [int(name[5:]) for name in names] == [3, 4, 6, 8, 9, 12]


def test_an_existing_run_is_not_started_over(config):
    run(config)
    before = weights(config)
    with pytest.raises(UsageError, match=r"holds a run at step 12 already: --resume"):
        run(config)
    assert_equal_weights(weights(config), before)


def test_resume_without_a_checkpoint_starts_and_says_so(config):
    result, output = run(dataclasses.replace(config, resume=True))
    assert result.step == 12
    assert "no checkpoint to resume from; starting at step 0" in output


def test_resuming_a_finished_run_does_nothing_to_it(config):
    run(config)
    before = (config.run / "metrics.jsonl").read_text()
    result, _ = run(dataclasses.replace(config, resume=True))
    assert result.step == 12
    assert (config.run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("model", {"n_layer": 3}, "model.n_layer was 2 and is 3"),
        ("data", {"tokenizer": "byte"}, "model.vocab_size"),
    ],
)
def test_another_shape_or_tokenizer_cannot_resume_a_run(group, values, said, config):
    run(config)
    with pytest.raises(UsageError, match=said):
        run(dataclasses.replace(change(config, group, **values), resume=True))


def test_another_text_cannot_resume_a_run(config, text_file):
    run(config)
    text = text_file.read_text()
    text_file.write_text(text.replace("V", "\u00e9"))  # as many characters, but not the same
    with pytest.raises(UsageError, match="the text's fingerprint was .* and is "):
        run(dataclasses.replace(config, resume=True))


def test_dropout_may_change_when_a_run_is_resumed(config):
    run(config)
    more = change(change(config, "model", dropout=0.0), "training", max_steps=14)
    result, _ = run(dataclasses.replace(more, resume=True))
    assert result.step == 14


@pytest.fixture
def default_sigint():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_continue(config, monkeypatch):
    update = Trainer.update

    def interrupted(self):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", interrupted)
    result, output = run(config)
    assert (result.step, result.signal) == (5, signal.SIGINT)
    assert checkpoints.find(config.run, "last").step == 5
    assert f"continue with: python train.py {config.run / 'config.toml'} --resume" in output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    run(dataclasses.replace(config, resume=True))
    whole = elsewhere(config, "-whole")
    run(whole)
    assert_equal_weights(weights(config), weights(whole))


@pytest.mark.usefixtures("default_sigint")
def test_a_second_ctrl_c_does_not_wait_for_the_step(config, monkeypatch):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "update", twice)
    with pytest.raises(KeyboardInterrupt):
        run(config)


def test_a_diverged_run_is_stopped_and_not_saved(config):
    config = change(config, "optimizer", learning_rate=1e30)
    with pytest.raises(UsageError, match="at step .*: training has diverged"):
        run(config)
    assert checkpoints.find(config.run, "last") is None


@pytest.mark.parametrize("group", ["evaluation", "checkpoint"])
def test_a_diverged_run_is_not_saved_even_if_nothing_is_logged(group, config):
    run(change(config, "training", max_steps=4))
    good = weights(config)
    config = change(change(config, "log", every=1000), group, every=6)
    config = change(config, "optimizer", learning_rate=1e30)
    with pytest.raises(UsageError, match="training has diverged"):
        run(dataclasses.replace(config, resume=True))
    assert_equal_weights(weights(config), good)


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("optimizer", {"name": "muon"}, "optimizer.name was adamw and is muon"),
        ("training", {"seed": 2}, "training.seed was 1337 and is 2"),
        ("training", {"batch_tokens": 256}, "training.batch_tokens was 128 and is 256"),
    ],
)
def test_a_change_of_a_fixed_setting_is_refused_and_changes_no_file(group, values, said, config):
    run(config)
    before = (config.run / "config.toml").read_text()
    with pytest.raises(UsageError, match=said):
        run(dataclasses.replace(change(config, group, **values), resume=True))
    assert (config.run / "config.toml").read_text() == before


def test_another_text_of_the_same_characters_cannot_resume_a_run(config, text_file):
    run(config)
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(
        UsageError, match="with other settings: the text's fingerprint was .* and is "
    ):
        run(dataclasses.replace(config, resume=True))


def test_the_configured_seed_sets_the_order_and_the_weights(config):
    one, two = trainer_of(config), trainer_of(change(config, "training", seed=5))
    assert not torch.equal(one.model.embed.weight, two.model.embed.weight)
    assert one.source.order.step(0).tolist() != two.source.order.step(0).tolist()


def test_the_validation_loss_is_that_of_the_held_out_text(config):
    trainer = trainer_of(change(config, "evaluation", windows=0))
    assert trainer.validation.shard is trainer.data.validation
    seen = []
    trainer.forward.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    trainer.evaluate(None)
    first = torch.from_numpy(trainer.data.validation.ids[:16].astype("int64"))
    assert torch.equal(seen[0][0], first)


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_learn_the_same_as_plain_ones(config):
    config = change(config, "model", dropout=0.0)
    plain, compiled = elsewhere(config, "-plain"), change(config, "training", compile="on")
    run(plain)
    run(compiled, sample=lambda model, data: Shown("a sample"))
    one, two = ([r["loss"] for r in records(c) if "loss" in r] for c in (plain, compiled))
    assert one == pytest.approx(two, rel=1e-4)


def test_compiling_is_block_by_block_and_in_place(monkeypatch, tiny_model):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda what: what)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    compile_blocks(tiny_model, "on", device=torch.device("cpu"), say=print)
    assert compiled == list(tiny_model.blocks)


def test_each_evaluation_shows_a_sample(config):
    modes = []

    def sample(model, data):
        modes.append(model.training)
        return Shown(f"a sample of {data.tokenizer.kind}", {"words": 4})

    _, output = run(config, sample=sample)
    assert output.count("│ a sample of char") == 4
    assert records(config)[-1]["sample"] == "a sample of char"
    assert records(config)[-1]["words"] == 4
    assert output.count("bits/byte, words 4") == 4


def test_an_impossible_sample_is_an_error_before_training(config, monkeypatch):
    def refuse(model, data):
        raise UsageError("no such prompt")

    monkeypatch.setattr(Trainer, "update", None)
    with pytest.raises(UsageError, match="no such prompt"):
        run(config, sample=refuse)


def test_a_vocabulary_can_be_padded_but_not_cut(config):
    run(change(config, "model", vocab_size=64))
    assert weights(config)["embed.weight"].shape == (64, 32)
    with pytest.raises(UsageError, match=r"model\.vocab_size is 5, and the char tokenizer"):
        run(elsewhere(change(config, "model", vocab_size=5), "-small"))


def test_a_large_vocabulary_is_the_tokenizers_too(config, tmp_path):
    text = tmp_path / "large.txt"
    text.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 1100))) * 2, encoding="utf-8")
    config = change(config, "data", source=str(text))
    run(change(config, "training", max_steps=1))
    assert weights(config)["embed.weight"].shape[0] == 1101


def test_a_run_with_unused_rows_is_resumed_with_them(config):
    run(change(change(config, "training", max_steps=4), "model", vocab_size=96))
    run(dataclasses.replace(config, resume=True))
    assert weights(config)["embed.weight"].shape[0] == 96


def test_a_run_of_torchs_muon_can_be_resumed(tmp_path):
    """An early version of format 2, before this project had its own Muon."""
    old = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "checkpoints" / "torch-muon", old)
    config = parse(TrainConfig, [str(old / "config.toml")], prog="train")
    config = dataclasses.replace(config, run_dir=str(old), resume=True)
    config = change(config, "data", source=str(old / "text.txt"))
    checkpoint = checkpoints.find(old, "last")
    muon, _ = resumed_from(checkpoint, config).optimizers
    saved = load_file(checkpoint.path / "training.safetensors")
    buffers = [muon.state[p]["momentum_buffer"] for p in muon.param_groups[0]["params"]]
    assert len(buffers) == 4
    assert all(any(torch.equal(b, s) for s in saved.values()) for b in buffers)
    result, said = run(change(config, "training", max_steps=20))
    assert "continuing from step 10" in said
    assert result.best_loss < checkpoint.progress["best_loss"]


def test_processes_on_different_machines_use_one_dtype(config, monkeypatch):
    trainer = trainer_of(change(config, "training", precision="auto"))
    monkeypatch.setattr(World, "largest", lambda self, number: 2)  # another one has float32 alone
    apart = trainer_of(
        change(change(config, "training", precision="auto"), "optimizer", name="muon")
    )
    assert apart.dtype == apart.optimizers[0].dtype == torch.float32
    assert trainer.dtype == choose_precision("auto", torch.device("cpu"))


def test_the_logits_are_freed_before_the_blocks_backward_pass(config):
    trainer = trainer_of(config)
    logits = []
    trainer.model.head.register_forward_hook(
        lambda module, args, output: logits.append(weakref.ref(output))
    )
    alive = []
    trainer.model.norm.register_full_backward_hook(
        lambda *args: alive.append(any(ref() is not None for ref in logits))
    )
    trainer.update()
    assert logits
    assert alive
    assert not any(alive)


def test_a_held_out_text_too_short_for_a_window_is_refused(config):
    config = change(config, "data", validation_fraction=0.001)
    with pytest.raises(UsageError, match="validation.bin has .* tokens, and one window"):
        run(config)


def test_the_trained_run_is_loaded_for_sampling(config):
    run(config)
    model, tokenizer = load(config.run)
    assert tokenizer.kind == "char"
    assert not model.training
    assert_equal_weights(dict(model.named_parameters()), weights(config))


def test_an_untrained_models_loss_is_the_loss_of_guessing(config):
    trainer = trainer_of(config)
    loss = trainer.update().loss
    assert loss == pytest.approx(math.log(trainer.config.model.vocab_size), abs=0.1)


def test_without_a_working_compiler_auto_continues_and_on_refuses(monkeypatch, tiny_model):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nin many lines")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    said = []
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    compile_blocks(tiny_model, "off", device=cuda, say=said.append)
    compile_blocks(tiny_model, "auto", device=cpu, say=said.append)
    assert said == []
    compile_blocks(tiny_model, "auto", device=cuda, say=said.append)
    assert said == ["torch.compile does not work here (no compiler); training continues without it"]
    with pytest.raises(UsageError, match="does not work here: no compiler$"):
        compile_blocks(tiny_model, "on", device=cpu, say=said.append)


def test_a_run_can_start_from_another_models_weights_and_tokenizer(config, tmp_path):
    run(change(config, "training", max_steps=60))
    start = change(elsewhere(config, "-on"), "model", n_layer=7, context_length=8, dropout=0.3)
    start = dataclasses.replace(start, init=config.run_dir)
    _, output = run(start)
    assert "2 layers" in output
    first = next(r["validation_loss"] for r in records(start))
    assert first < 3.0  # less than a new model's, which guesses
    found = checkpoints.find(start.run, "last")
    assert (found.model.n_layer, found.model.context_length, found.model.dropout) == (2, 8, 0.3)
    assert (start.run / "tokenizer.json").read_text() == (config.run / "tokenizer.json").read_text()
    more = dataclasses.replace(change(start, "training", max_steps=14), resume=True)
    assert run(more)[0].step == 14
    kept = weights(start)["position.weight"]
    assert kept.shape == (8, 32)


def test_a_run_can_start_from_hugging_faces_gpt2(config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_positions=32, n_layer=1, n_head=2, n_embd=16))
    theirs.save_pretrained(tmp_path / "gpt2")
    config = dataclasses.replace(config, init=str(tmp_path / "gpt2"))
    _, output = run(config)
    assert "gpt2 tokenizer" in output
    _, tokenizer = load(config.run)
    assert tokenizer.vocab_size == 50257


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_each_step_has_the_schedules_rate(schedule, config):
    config = change(change(config, "log", every=1), "optimizer", schedule=schedule)
    run(config)
    rates = [r["learning_rate"] for r in records(config) if "learning_rate" in r]
    expected = [
        config.optimizer.learning_rate
        * learning_rate_factor(step, max_steps=12, config=config.optimizer)
        for step in range(12)
    ]
    assert rates == pytest.approx(expected)


def test_a_step_clips_the_gradients(config, monkeypatch):
    trainer = trainer_of(change(config, "training", gradient_clip=0.01))
    for optimizer in trainer.optimizers:
        monkeypatch.setattr(optimizer, "zero_grad", lambda set_to_none: None)
    norm = trainer.update().norm
    clipped = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert norm > 0.1
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_float16s_gradients_are_unscaled_before_they_are_clipped(config):
    config = change(config, "model", dropout=0.0)
    norms = [
        trainer_of(change(config, "training", precision=precision)).update().norm
        for precision in ("float32", "float16")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_the_forward_pass_uses_the_configured_precision(config):
    for precision in ("float32", "bfloat16", "float16"):
        trainer = trainer_of(change(config, "training", precision=precision))
        seen = []
        trainer.model.head.register_forward_hook(
            lambda m, i, out, seen=seen: seen.append(out.dtype)
        )
        trainer.update()
        assert set(seen) == {getattr(torch, precision)}


def test_the_best_loss_and_the_loss_scale_are_resumed(config):
    config = change(config, "training", precision="float16")
    result, _ = run(config)
    found = checkpoints.find(config.run, "last")
    resumed = resumed_from(found, config)
    assert resumed.best_loss == result.best_loss
    assert resumed.best == (config.run / "best").read_text().strip()
    found.progress["scaler"]["scale"] = 1234.0
    resumed = resumed_from(found, config)
    assert resumed.scaler.get_scale() == 1234.0


def test_a_record_has_the_mean_loss_and_the_speed_without_evaluations(config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("gpt.training.loop.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("gpt.training.loop.peak_flops", lambda device: 1e9)
    evaluate = Trainer.evaluate

    def slow_evaluation(self, *arguments):
        clock[0] += 100
        return evaluate(self, *arguments)

    def two_second_step(self):
        clock[0] += 2
        self.step += 1
        return Gradients(float(self.step), 1.0, torch.tensor(1.0))

    monkeypatch.setattr(Trainer, "evaluate", slow_evaluation)
    monkeypatch.setattr(Trainer, "update", two_second_step)
    config = change(change(config, "log", every=3), "training", precision="bfloat16")
    run(config)
    logged = [r for r in records(config) if "loss" in r]
    assert [r["loss"] for r in logged] == [2.0, 5.0, 8.0, 11.0]
    assert [r["tokens_per_second"] for r in logged] == [64.0] * 4
    flops = checkpoints.load_model(checkpoints.find(config.run)).flops_per_token()
    assert [r["mfu"] for r in logged] == pytest.approx([64 * flops / 1e9] * 4)


def poison(monkeypatch, steps, *, parameter="blocks.1.mlp.down.weight", value=math.nan):
    """Make a gradient NaN in these steps (from 1)."""
    accumulate = Trainer.accumulate

    def poisoned(self, batch, n_targets):
        total = accumulate(self, batch, n_targets)
        if self.step + 1 in steps:
            self.model.get_parameter(parameter).grad[0, 0] = value
        return total

    monkeypatch.setattr(Trainer, "accumulate", poisoned)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_changes_anything(
    config, monkeypatch
):
    poison(monkeypatch, {7})
    with pytest.raises(UsageError) as caught:
        run(config)
    told = str(caught.value)
    windows = trainer_of(config).source.order.step(6)
    assert re.search(r"largest gradients are blocks\.1\.mlp\.down\.weight nan, .* at step 7", told)
    first = ", ".join(map(str, windows[:5]))
    assert f"with the windows {first} and 3 more in its batch" in told
    found = json.loads((config.run / "nonfinite-00000007.json").read_text())
    assert found["windows"] == windows.tolist()
    assert found["gradient_norms"]["blocks.1.mlp.down.weight"] == "nan"
    assert len(found["gradient_norms"]) == len(weights(config))
    assert checkpoints.find(config.run, "last").step == 4
    monkeypatch.undo()
    run(dataclasses.replace(config, resume=True))
    whole = elsewhere(config, "-whole")
    run(whole)
    assert_equal_weights(weights(config), weights(whole))


def test_skipped_updates_are_counted_and_change_nothing(config, monkeypatch):
    poison(monkeypatch, {3, 6, 7}, value=math.inf)
    config = change(change(config, "training", skip_nonfinite=3), "optimizer", name="muon")
    trainer = trainer_of(config)
    for step in range(1, 8):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.update()
        changed = any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
        assert changed == (step not in {3, 6, 7})
    _, output = run(config)
    assert "step 6: the loss is" in output
    assert "the update is skipped, 2 of 3" in output
    skips = [(r["step"], r["skipped"]) for r in records(config) if "skipped" in r]
    assert skips == [(3, 1), (6, 2), (7, 3)]
    assert checkpoints.find(config.run, "last").progress["skipped"] == 3
    poison(monkeypatch, {14})
    longer = change(config, "training", max_steps=16)
    with pytest.raises(UsageError, match="at step 14.*after 3 skipped updates: training has div"):
        run(dataclasses.replace(longer, resume=True))


def test_a_skipped_update_moves_no_preference_of_experts(config):
    experts = {"n_expert": 4, "moe_balance": "bias"}
    trainer = trainer_of(tiny.change(config, model=experts, training={"skip_nonfinite": 3}))
    bad = 1
    trainer.objective = lambda logits, batch: (
        next_token(logits, batch) * (math.nan if trainer.step == bad else 1)
    )
    for step in range(3):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.update()
        changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
        assert any("preference" in name for name in changed) == (step != bad)
        assert step != bad or not changed
        assert all(m.load is None for m in trainer.model.modules() if isinstance(m, MoE))


def test_a_loss_that_is_not_finite_is_in_no_mean(config, monkeypatch):
    config = change(change(config, "training", skip_nonfinite=1), "log", every=4)
    accumulate = Trainer.accumulate
    losses = []

    def poisoned(self, batch, n_targets):
        total = accumulate(self, batch, n_targets)
        losses.append(total.item() if self.step != 1 else math.nan)
        return total if self.step != 1 else total * math.nan

    monkeypatch.setattr(Trainer, "accumulate", poisoned)
    run(config)
    logged = next(r for r in records(config) if "loss" in r)
    assert logged["step"] == 4
    finite = [loss for loss in losses[:4] if math.isfinite(loss)]
    assert len(finite) == 3
    assert logged["loss"] == pytest.approx(sum(finite) / 3)


def test_weights_that_are_not_finite_are_not_saved(config, monkeypatch):
    config = change(change(config, "checkpoint", every=2), "log", every=100)
    update = Trainer.update

    def broken(self):
        result = update(self)
        if self.step == 6:
            with torch.no_grad():
                self.model.norm.weight[0] = math.inf
        return result

    monkeypatch.setattr(Trainer, "update", broken)
    with pytest.raises(UsageError, match="a weight is not finite at step 6: training has diverged"):
        run(config)
    assert checkpoints.find(config.run, "last").step == 4


def test_a_loss_scale_that_is_too_high_is_lowered_and_training_continues(config):
    config = change(config, "training", precision="float16")
    trainer = trainer_of(config)
    trainer.update()
    trainer.scaler._scale.fill_(2.0**40)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    loss, norm, _ = trainer.update()
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.skipped == 0
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    trainer.scaler._scale.fill_(0.5)  # at which nothing is the scale's doing any more
    poisoned = trainer.accumulate

    def accumulate(batch, n_targets):
        total = poisoned(batch, n_targets)
        trainer.model.norm.weight.grad[0] = math.inf
        return total

    trainer.accumulate = accumulate
    with pytest.raises(UsageError, match="training has diverged"):
        trainer.update()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_loss_scale_of_one_or_more_can_cause_a_nonfinite_gradient(scale, config):
    trainer = trainer_of(change(config, "training", precision="float16"))
    trainer.scaler.scale(torch.ones(()))
    trainer.scaler._scale.fill_(scale)
    assert trainer.was_scaled_too_far() == (scale >= 1)
    assert not trainer_of(config).was_scaled_too_far()


class HalfMasked(TextWindows):
    def batch(self, windows):
        batch = super().batch(windows)
        return Batch(batch.tokens, batch.targets.masked_fill(batch.targets % 2 == 0, IGNORED))


def test_masked_targets_do_not_count(config, monkeypatch):
    monkeypatch.setattr("gpt.data.prepared.TextWindows", HalfMasked)
    trainer = trainer_of(change(config, "model", dropout=0.0))
    batch = trainer.source.batch(0, trainer.world)
    logits = trainer.model(batch.tokens).detach()
    counted = batch.targets != IGNORED
    assert 20 < counted.sum() < 100
    expected = torch.nn.functional.cross_entropy(logits[counted], batch.targets[counted])
    assert trainer.update()[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_with_only_masked_targets_is_an_error_that_names_its_windows(config, monkeypatch):
    class Masked(TextWindows):
        def batch(self, windows):
            batch = super().batch(windows)
            return Batch(batch.tokens, torch.full_like(batch.targets, IGNORED))

    monkeypatch.setattr("gpt.data.prepared.TextWindows", Masked)
    trainer = trainer_of(config)
    first = trainer.source.order.step(0)[0]
    with pytest.raises(UsageError, match=f"step 1 has nothing .* targets in its windows {first}, "):
        trainer.update()


def test_a_second_run_on_one_folder_is_refused(config):
    with held(config.run), pytest.raises(UsageError, match="is in use by another process"):
        run(config)
    run(config)


def test_a_missing_text_leaves_no_folder(config):
    config = change(config, "data", source="no/such/text")
    with pytest.raises(UsageError, match="data.source is 'no/such/text'"):
        run(config)
    assert not config.run.exists()


def test_changed_settings_are_reported_and_fixed_ones_refused(config):
    run(change(config, "training", max_steps=4))
    more = change(change(config, "log", every=1), "optimizer", learning_rate=1e-3)
    _, output = run(dataclasses.replace(change(more, "training", max_steps=8), resume=True))
    assert [line for line in output.splitlines() if line.startswith("changed")] == [
        "changed  training.max_steps was 4 and is 8",
        "changed  optimizer.learning_rate was 0.003 and is 0.001",
        "changed  log.every was 2 and is 1",
    ]
    other = change(change(more, "training", seed=3, max_steps=9), "model", n_layer=1)
    with pytest.raises(UsageError) as caught:
        run(dataclasses.replace(other, resume=True))
    assert str(caught.value) == (
        f"{config.run} cannot be resumed with other settings: model.n_layer was 2 and is 1; "
        "training.seed was 1337 and is 3 (these may change: training.max_steps was 8 and is 9)"
    )


def test_the_fixed_settings_exist(config):
    names = set(settings(config, prepare(config.data, config.cache_dir).train))
    assert set(FIXED) <= names
    for group, free in FIXED_GROUPS.items():
        assert {f"{group}.{name}" for name in free} <= names
    assert is_fixed("model.n_embd")
    assert is_fixed("data.tokenizer")
    assert not is_fixed("model.dropout")
    assert not is_fixed("training.max_steps")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"[x\xff")])
def test_fixed_settings_are_known_without_the_runs_configuration(damage, config):
    run(config)
    damage(config.run / "config.toml")
    other = change(change(config, "data", validation_fraction=0.3), "log", every=1)
    with pytest.raises(
        UsageError, match=r"data.validation_fraction was 0.05 and is 0.3 \(these may"
    ):
        run(dataclasses.replace(other, resume=True))
    _, output = run(dataclasses.replace(change(config, "log", every=1), resume=True))
    assert "changed  log.every was 2 and is 1" in output


def test_a_changed_result_of_auto_is_reported_on_resuming(config):
    config = change(config, "training", precision="auto")
    run(config)
    found = checkpoints.find(config.run, "last")
    found.progress["place"] |= {"precision": "float16", "processes": 8, "strategy": "ddp"}
    trainer = trainer_of(config)
    assert trainer.resume(found) == [
        f"precision was float16 and is {str(trainer.dtype)[6:]}",
        "processes was 8 and is 1",
        "strategy was ddp and is single",
    ]


def test_a_checkpoint_stores_the_results_of_auto(config):
    run(config)
    place = {"device": "cpu", "precision": "float32", "processes": 1, "strategy": "single"}
    assert checkpoints.find(config.run, "last").progress["place"] == place


def test_a_damaged_checkpoint_is_renamed_and_does_not_count(config):
    config = change(config, "checkpoint", every=2, keep=2)
    run(config)
    newest = config.run / "checkpoints" / "step-00000012"
    (newest / "model.safetensors").write_bytes(b"damaged")
    _, output = run(dataclasses.replace(change(config, "training", max_steps=11), resume=True))
    assert "continuing from step 10" in output
    assert (
        f"a damaged checkpoint was renamed to {newest.parent / 'damaged-step-00000012'}" in output
    )
    left = sorted(p.name for p in newest.parent.iterdir())
    assert left == ["damaged-step-00000012", "step-00000010", "step-00000011"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_overflow_of_one_parameter_changes_no_other(optimizer, clip, config):
    config = change(change(config, "optimizer", name=optimizer), "training", precision="float16")
    trainer = trainer_of(change(config, "training", gradient_clip=clip))
    trainer.update()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    handle = trainer.model.embed.weight.register_hook(lambda gradient: gradient * math.inf)
    scale = trainer.scaler.get_scale()
    trainer.update()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    assert trainer.scaler.get_scale() == scale / 2
    handle.remove()
    trainer.update()
    assert not torch.equal(before["norm.weight"], trainer.model.norm.weight)


def test_the_metrics_are_json_after_an_overflow_too(config):
    def pedantic(constant):
        raise AssertionError(constant)

    config = change(change(config, "training", precision="float16"), "log", every=1)
    accumulate = Trainer.accumulate

    def once(self, batch, n_targets):
        if self.step == 4:
            self.scaler._scale.fill_(2.0**40)
        return accumulate(self, batch, n_targets)

    with mock.patch.object(Trainer, "accumulate", once):
        run(config)
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pedantic) for line in lines]
    assert 5 in [r["step"] for r in parsed if r.get("gradient_norm", 0) is None]
    assert all("loss_scale" in r for r in parsed if "loss" in r)
    counts = [r["overflows"] for r in parsed if "loss" in r]
    assert counts[:6] == [0, 0, 0, 0, 1, 2]
    assert checkpoints.find(config.run, "last").progress["overflows"] == counts[-1]


def test_a_resumed_runs_first_record_includes_the_steps_before_the_stop(config):
    config = change(change(config, "log", every=5), "checkpoint", every=3, keep=9)
    whole = elsewhere(config, "-whole")
    run(whole)
    run(config)
    shutil.rmtree(config.run / "checkpoints" / "step-00000012")
    shutil.rmtree(config.run / "checkpoints" / "step-00000009")
    shutil.rmtree(config.run / "checkpoints" / "step-00000008")
    (config.run / "checkpoints" / "step-00000006").rename(config.run / "checkpoints" / "x")
    _, output = run(dataclasses.replace(config, resume=True))
    assert "continuing from step 4" in output
    assert [(r["step"], r.get("loss")) for r in records(config)] == [
        (r["step"], r.get("loss")) for r in records(whole)
    ]


def test_resuming_uses_the_newest_valid_checkpoint_whatever_last_names(config):
    run(change(config, "checkpoint", keep=9))
    (config.run / "last").write_text("step-00000004\n")
    before = (config.run / "metrics.jsonl").read_text()
    _, output = run(dataclasses.replace(config, resume=True))
    assert "continuing from step 12" in output
    assert (config.run / "last").read_text() == "step-00000012\n"
    assert (config.run / "metrics.jsonl").read_text() == before


def test_dropout_depends_only_on_the_step(config):
    one, two = trainer_of(config), trainer_of(config)
    torch.rand(100)
    losses = [one.update()[0]]
    torch.rand(7)
    losses.append(one.update()[0])
    assert losses == [two.update()[0], two.update()[0]]
    other_rank = trainer_of(config)
    other_rank.world = World(rank=1, size=1)
    other_rank.source.batch = lambda step, world: one.source.batch(step, World())
    assert other_rank.update()[0] != losses[0]  # the processes do not drop the same


def test_a_run_reports_the_time_of_each_part(config):
    _, output = run(change(config, "log", profile=2))
    assert re.search(
        r"a step took [\d.]+ ms: data \d+%, forward \d+%, backward \d+%, optimizer \d+%", output
    )
    assert re.search(r"a checkpoint \(3 in all\) stopped the run for \d+ ms", output)
    assert f"the trace of 2 steps is {config.run / 'trace.json'}" in output
    assert json.loads((config.run / "trace.json").read_text())["traceEvents"]
    for record in records(config):
        if "loss" in record:
            parts = [record[f"{p}_seconds"] for p in ("data", "forward", "backward", "optimizer")]
            assert all(part > 0 for part in parts)
            assert sum(parts) < 128 / record["tokens_per_second"] * 1.01


def test_the_groups_of_parameters_are_listed_at_the_start(config):
    _, output = run(change(config, "optimizer", name="muon"))
    assert "muon     8 matrices (24,576 numbers), learning rate 0.02, decay 0.1" in output
    assert re.search(
        r"adamw    2 matrices \([\d,]+ numbers\), learning rate 0.003, decay 0.1", output
    )
    assert "adamw    18 biases and norms (896 numbers), learning rate 0.003, decay 0" in output


def test_a_forecast_includes_all_remaining_steps_and_evaluations(config, monkeypatch):
    made = []

    class Recorded(Forecast):
        def __init__(self, **left):
            super().__init__(**left)
            made.append({**left, "evaluated": 0, "steps made": 0})

        def add(self, seconds):
            assert seconds > 0
            made[-1]["steps made"] += 1
            return f"step {made[-1]['steps made']} was counted"

        def evaluated(self, seconds):
            made[-1]["evaluated"] += seconds > 0

    monkeypatch.setattr("gpt.training.loop.Forecast", Recorded)
    _, output = run(change(config, "training", max_steps=9))
    assert "step 9 was counted" in output
    seconds = made[0].pop("evaluation_seconds")
    assert seconds > 0
    assert made == [{"steps": 9, "evaluations": 3, "evaluated": 3, "steps made": 9}]
    shutil.rmtree(config.run / "checkpoints" / "step-00000009")
    run(dataclasses.replace(change(config, "training", max_steps=12), resume=True))
    left = {"steps": 4, "evaluations": 1, "evaluation_seconds": None}
    assert made[1] == left | {"evaluated": 1, "steps made": 4}


def test_an_evaluation_without_a_sample_shows_none(config):
    trainer, shown = trainer_of(config), []

    class Kept(Silent):
        def evaluation(self, record, *, best, sample):
            shown.append((record["step"], best, sample))

    trainer.reporter = Kept()
    trainer.evaluate(None)
    trainer.evaluate(lambda model, data: Shown("Once"))
    assert shown == [(0, False, ""), (0, False, "Once")]


def test_a_batch_is_read_once(config, monkeypatch):
    read = []

    class Counted(TextWindows):
        def batch(self, windows):
            read.append(windows.tolist())
            return super().batch(windows)

    monkeypatch.setattr("gpt.data.prepared.TextWindows", Counted)
    trainer = trainer_of(config)
    for _ in range(3):
        trainer.update()
    assert read == [trainer.source.order.step(step).tolist() for step in range(4)]


def test_a_resumed_run_that_cannot_save_names_its_last_checkpoint(config, monkeypatch):
    run(change(config, "training", max_steps=4))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.raises(UsageError, match="those up to step-00000004 are complete"):
        run(dataclasses.replace(config, resume=True))


def test_tf32_is_on_if_it_is_configured(config):
    before = torch.get_float32_matmul_precision()
    trainer_of(change(config, "training", tf32=True))
    assert torch.get_float32_matmul_precision() == "high"
    trainer_of(config)
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)


def test_a_run_of_format_1_can_be_resumed(config):
    """Format 1 numbers the parameters in an optimizer's state."""
    config = change(config, "optimizer", name="muon")
    run(change(config, "training", max_steps=8))
    found = checkpoints.find(config.run, "last")
    trainer = resumed_from(found, config)
    old = {
        "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        "scaler": {},
        "random": {"cpu": torch.get_rng_state()},
        "best_loss": 1.5,
        "identity": {"training.seed": "1337"},
    }
    as_format_1(found.path, old)
    resumed = resumed_from(checkpoints.verify(found.path), config)
    assert resumed.best_loss == 1.5
    for one, two in zip(trainer.optimizers, resumed.optimizers, strict=True):
        for (_, state), (_, other) in zip(one.state.items(), two.state.items(), strict=True):
            assert state.keys() == other.keys()
            assert all(torch.equal(state[key], other[key]) for key in state)
    assert resumed.update() == trainer.update()


def as_format_1(path, training):
    """Rewrite a checkpoint in format 1."""
    (path / "training.safetensors").unlink()
    torch.save(training, path / "training.pt")
    meta = json.loads((path / "meta.json").read_text())
    meta = {key: meta[key] for key in ("step", "model", "metrics")} | {"format": 1}
    names = ("model.safetensors", "training.pt")
    meta["files"] = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in names}
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))


def test_the_last_records_speed_is_for_its_own_steps(config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("gpt.training.loop.time.monotonic", lambda: clock[0])

    def two_second_step(self):
        clock[0] += 2
        self.step += 1
        return Gradients(1.0, 1.0, torch.tensor(1.0))

    monkeypatch.setattr(Trainer, "update", two_second_step)
    run(change(config, "log", every=5))
    assert [r["tokens_per_second"] for r in records(config) if "loss" in r] == [64.0] * 3


def test_a_missing_best_checkpoint_is_replaced_by_a_later_one(config):
    run(change(config, "checkpoint", keep=9))
    shutil.rmtree(config.run / "checkpoints" / "step-00000004")  # the best until the one
    for step in (8, 12):
        meta = config.run / "checkpoints" / f"step-{step:08d}" / "meta.json"
        found = json.loads(meta.read_text())
        del found["sha256"]
        found["progress"]["best"] = "step-00000004"
        text = json.dumps(found, sort_keys=True).encode()
        found["sha256"] = hashlib.sha256(text).hexdigest()
        meta.write_text(json.dumps(found))
    (config.run / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"damaged")
    result, output = run(dataclasses.replace(config, resume=True))
    assert "continuing from step 8" in output
    assert "step 12: validation" in output
    assert (config.run / "best").read_text() == "step-00000012\n"
    assert result.best_loss == records(config)[-1]["validation_loss"]


def test_one_process_says_that_its_checkpoints_are_not_sharded(config):
    _, output = run(change(config, "checkpoint", format="sharded"))
    assert "checkpoint.format is sharded, which only fsdp supports" in output
    assert (checkpoints.find(config.run).path / "model.safetensors").exists()


def test_a_default_width_can_be_spelled_out_on_resuming(config):
    run(config)
    same = change(config, "model", n_kv_head=2, n_inner=128)
    _, output = run(dataclasses.replace(same, resume=True))
    assert "changed" not in output
    with pytest.raises(UsageError, match="model.n_inner was 128 and is 64"):
        run(dataclasses.replace(change(config, "model", n_inner=64), resume=True))


def test_the_best_loss_on_other_windows_does_not_count(config):
    run(config)
    found = checkpoints.find(config.run, "last")
    found.progress["best_loss"] = 0.0
    for windows, best in ((8, 0.0), (5, math.inf)):
        other = change(config, "evaluation", windows=windows)
        assert resumed_from(found, other).best_loss == best


def test_patience_ends_a_run_that_no_longer_improves(config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0, 1.1, 1.2])
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer, sample: next(losses))
    config = change(change(config, "evaluation", every=2, patience=2), "checkpoint", keep=9)
    result, output = run(config)
    assert (result.step, result.best_loss, result.signal) == (6, 2.0, None)
    assert (config.run / "best").read_text() == "step-00000002\n"
    assert "the run ends at step 6: no new lowest validation loss in 2 evaluations" in output
    assert "is saved; continue" not in output
    # a resumed run remembers it, and more patience continues it
    result, _ = run(dataclasses.replace(config, resume=True))
    assert result.step == 6
    more = change(dataclasses.replace(config, resume=True), "evaluation", every=2, patience=3)
    result, _ = run(more)
    assert (result.step, result.best_loss) == (12, 1.0)


def test_patience_counts_from_the_loss_before_training(config, monkeypatch):
    losses = iter([2.0, 2.5, 2.4, 2.3])
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer, sample: next(losses))
    config = change(change(config, "evaluation", every=2, patience=2), "checkpoint", keep=9)
    result, output = run(config)
    assert result.step == 4
    assert "no new lowest validation loss in 2 evaluations" in output
    assert (config.run / "best").read_text() == "step-00000004\n"


def test_attention_windows_of_a_run_grow_with_its_steps(config):
    config = change(config, "training", window_start=4, window_fraction=0.5)
    trainer, seen = trainer_of(config), []
    for _ in range(8):
        trainer.update()
        seen.append(trainer.model.window_limit)
    assert seen == [4, 4, 8, 8, 12, 12, 0, 0]
    assert trainer.gradients().loss != trainer_of(config).gradients().loss
