import dataclasses
import io
import json
import math
import os
import signal

import pytest
import torch
from rich.console import Console

from gpt import checkpoint as checkpoints
from gpt.config import (
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
    UsageError,
    parse,
)
from gpt.data.prepare import prepare
from gpt.interop.load import load
from gpt.training.compilation import compile_blocks
from gpt.training.loop import Trainer, train
from gpt.training.schedule import learning_rate_factor


@pytest.fixture
def config(text_file, tmp_path):
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(
            vocab_size=0, context_length=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1
        ),
        data=DataConfig(source=str(text_file)),
        training=TrainingConfig(
            max_steps=12, batch_tokens=128, micro_batch_size=4, precision="float32", device="cpu"
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        evaluation=EvaluationConfig(every=4, windows=8),
        log=LogConfig(every=2),
    )


def change(config, group, **values):
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **values)}
    )


def elsewhere(config, name):
    return dataclasses.replace(config, run_dir=config.run_dir + name)


def run(config, **options):
    console = Console(file=io.StringIO(), width=200)
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(optimizer, config):
    config = change(config, "training", max_steps=60)
    config = change(config, "optimizer", name=optimizer)
    result, _ = run(config)
    losses = [r["loss"] for r in records(config) if "loss" in r]
    assert losses[0] > 3
    assert losses[-1] < losses[0] - 0.8
    assert result.best_loss < 2.7


def test_a_run_leaves_the_folder_that_the_design_names(config):
    result, output = run(config)
    assert (result.step, result.signal) == (12, None)
    assert {p.name for p in config.run.iterdir()} == {
        "config.toml", "tokenizer.json", "metrics.jsonl", "checkpoints", "best", "last", "data",
        ".lock",
    }  # fmt: skip
    assert (config.run / "last").read_text() == "step-00000012\n"
    assert [r["step"] for r in records(config) if "loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records(config) if "validation_loss" in r] == [0, 4, 8, 12]
    assert "step 12: validation" in output


def test_the_resolved_configuration_runs_again_as_it_stands(config):
    run(config)
    again = parse(TrainConfig, [str(config.run / "config.toml")], prog="train.py")
    assert again.model.vocab_size == prepare(config.data, config.cache_dir).tokenizer.vocab_size
    first = weights(config)
    again = elsewhere(again, "-again")
    run(again)
    assert_equal_weights(weights(again), first)


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_seed_another(config):
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
def test_a_resumed_run_is_the_uninterrupted_one(optimizer, config):
    config = change(config, "optimizer", name=optimizer, schedule="constant")
    whole = elsewhere(config, "-whole")
    run(whole)
    run(change(config, "training", max_steps=8))
    resumed = dataclasses.replace(config, resume=True)
    result, output = run(resumed)
    assert result.step == 12
    assert "going on from step 8" in output
    assert_equal_weights(weights(config), weights(whole))
    assert [r["step"] for r in records(config)] == [r["step"] for r in records(whole)]
    assert records(config)[-1]["validation_loss"] == records(whole)[-1]["validation_loss"]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_changes_no_gradient(micro_batch_size, config):
    config = change(config, "model", dropout=0.0)
    config = change(config, "training", gradient_clip=0.0)

    def gradients(size):
        trainer = trainer_of(change(config, "training", micro_batch_size=size))
        trainer.optimizers = []
        loss, _ = trainer.update()
        return loss, {n: p.grad for n, p in trainer.model.named_parameters()}

    whole_loss, whole = gradients(8)
    loss, split = gradients(micro_batch_size)
    torch.testing.assert_close(loss, whole_loss)
    for name in whole:
        error = (split[name] - whole[name]).norm() / whole[name].norm()
        assert error < 1e-5, name


def test_the_loss_that_is_reported_is_the_mean_over_the_steps_tokens(config):
    trainer = trainer_of(change(config, "model", dropout=0.0))
    batch = trainer.windows.batch(trainer.order.step(0))
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


def test_best_names_the_checkpoint_with_the_least_validation_loss(config):
    config = change(config, "optimizer", learning_rate=0.3, schedule="constant")  # it gets worse
    config = change(config, "checkpoint", keep=1)
    result, _ = run(config)
    evaluations = [r for r in records(config) if "validation_loss" in r and r["step"]]
    best = min(evaluations, key=lambda r: r["validation_loss"])
    assert checkpoints.find(config.run, "best").step == best["step"]
    assert result.best_loss == best["validation_loss"]
    assert checkpoints.find(config.run, "last").step == 12


def test_checkpoints_are_written_between_evaluations_when_asked_for(config):
    config = change(config, "checkpoint", every=3, keep=9)
    run(config)
    names = sorted(p.name for p in (config.run / "checkpoints").iterdir())
    assert [int(name[5:]) for name in names] == [3, 4, 6, 8, 9, 12]


def test_a_run_that_is_there_is_not_started_over(config):
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
def test_what_does_not_fit_the_run_cannot_resume_it(group, values, said, config):
    run(config)
    with pytest.raises(UsageError, match=said):
        run(dataclasses.replace(change(config, group, **values), resume=True))


def test_another_text_cannot_resume_a_run(config, text_file):
    run(config)
    text = text_file.read_text()
    text_file.write_text(text.replace("V", "\u00e9"))  # as many characters, but not the same
    with pytest.raises(UsageError, match="the text's fingerprint was .* and is "):
        run(dataclasses.replace(config, resume=True))


def test_dropout_may_change_on_resuming(config):
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
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(config, monkeypatch):
    update = Trainer.update

    def interrupted(self):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", interrupted)
    result, output = run(config)
    assert (result.step, result.signal) == (5, signal.SIGINT)
    assert checkpoints.find(config.run, "last").step == 5
    assert f"go on with: python train.py {config.run / 'config.toml'} --resume" in output
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
def test_what_is_no_number_is_not_saved_even_when_it_is_not_logged(group, config):
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
def test_what_would_make_another_run_is_refused_and_the_run_is_left_as_it_was(
    group, values, said, config
):
    run(config)
    before = (config.run / "config.toml").read_text()
    with pytest.raises(UsageError, match=said):
        run(dataclasses.replace(change(config, group, **values), resume=True))
    assert (config.run / "config.toml").read_text() == before


def test_another_text_of_the_same_characters_cannot_resume_a_run(config, text_file):
    run(config)
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(UsageError, match="as another run: the text's fingerprint was .* and is "):
        run(dataclasses.replace(config, resume=True))


def test_the_seeds_of_the_order_and_of_the_weights_are_the_configurations(config):
    one, two = trainer_of(config), trainer_of(change(config, "training", seed=5))
    assert not torch.equal(one.model.embed.weight, two.model.embed.weight)
    assert one.order.step(0).tolist() != two.order.step(0).tolist()


def test_the_validation_loss_is_that_of_the_held_out_text(config):
    trainer = trainer_of(change(config, "evaluation", windows=0))
    assert trainer.validation.ids.tolist() == trainer.data.validation.ids.tolist()
    seen = []
    trainer.forward.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    trainer.evaluate(None)
    first = torch.from_numpy(trainer.data.validation.ids[:16].astype("int64"))
    assert torch.equal(seen[0][0], first)


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_blocks_learn_what_plain_ones_do(config):
    config = change(config, "model", dropout=0.0)
    plain, compiled = elsewhere(config, "-plain"), change(config, "training", compile="on")
    run(plain)
    run(compiled, sample=lambda model, tokenizer: "a sample")
    one, two = ([r["loss"] for r in records(c) if "loss" in r] for c in (plain, compiled))
    assert one == pytest.approx(two, rel=1e-4)


def test_compiling_is_block_by_block_and_in_place(monkeypatch, tiny_model):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda what: what)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    compile_blocks(tiny_model, "on", device=torch.device("cpu"), say=print)
    assert compiled == list(tiny_model.blocks)


def test_a_sample_goes_with_each_evaluation(config):
    modes = []

    def sample(model, tokenizer):
        modes.append(model.training)
        return f"a sample of {tokenizer.kind}"

    _, output = run(config, sample=sample)
    assert output.count("│ a sample of char") == 4
    assert records(config)[-1]["sample"] == "a sample of char"


def test_a_sample_that_cannot_be_made_is_told_before_training(config, monkeypatch):
    def refuse(model, tokenizer):
        raise UsageError("no such prompt")

    monkeypatch.setattr(Trainer, "update", None)
    with pytest.raises(UsageError, match="no such prompt"):
        run(config, sample=refuse)


def test_a_vocabulary_may_be_padded_and_not_cut(config):
    run(change(config, "model", vocab_size=64))
    assert weights(config)["embed.weight"].shape == (64, 32)
    with pytest.raises(UsageError, match=r"model\.vocab_size is 5, and the char tokenizer"):
        run(elsewhere(change(config, "model", vocab_size=5), "-small"))


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


def test_an_untrained_models_loss_is_that_of_guessing(config):
    trainer = trainer_of(config)
    loss, _ = trainer.update()
    assert loss == pytest.approx(math.log(trainer.config.model.vocab_size), abs=0.1)


def test_without_a_working_compiler_auto_goes_on_and_on_refuses(monkeypatch, tiny_model):
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
    assert said == ["torch.compile does not work here (no compiler); training goes on without it"]
    with pytest.raises(UsageError, match="does not work here: no compiler$"):
        compile_blocks(tiny_model, "on", device=cpu, say=said.append)


def test_a_run_may_start_from_another_models_weights_and_tokenizer(config, tmp_path):
    run(change(config, "training", max_steps=60))
    start = change(elsewhere(config, "-on"), "model", n_layer=7, context_length=8, dropout=0.3)
    start = dataclasses.replace(start, init=config.run_dir)
    _, output = run(start)
    assert "2 layers" in output
    first = next(r["validation_loss"] for r in records(start))
    assert first < 3.0  # not a new model's, which is that of guessing
    found = checkpoints.find(start.run, "last")
    assert (found.model.n_layer, found.model.context_length, found.model.dropout) == (2, 8, 0.3)
    assert (start.run / "tokenizer.json").read_text() == (config.run / "tokenizer.json").read_text()
    more = dataclasses.replace(change(start, "training", max_steps=14), resume=True)
    assert run(more)[0].step == 14
    kept = weights(start)["position.weight"]
    assert kept.shape == (8, 32)


def test_a_run_may_start_from_hugging_faces_gpt2(config, tmp_path):
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


def test_a_step_clips_the_gradients(config):
    trainer = trainer_of(change(config, "training", gradient_clip=0.01))
    trainer.optimizers = []  # so that the gradients stay
    _, norm = trainer.update()
    clipped = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert norm > 0.1
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_float16s_gradients_are_unscaled_before_they_are_clipped(config):
    config = change(config, "model", dropout=0.0)
    norms = [
        trainer_of(change(config, "training", precision=precision)).update()[1]
        for precision in ("float32", "float16")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_the_forward_runs_in_the_precision_that_is_asked_for(config):
    for precision in ("float32", "bfloat16", "float16"):
        trainer = trainer_of(change(config, "training", precision=precision))
        seen = []
        trainer.model.head.register_forward_hook(
            lambda m, i, out, seen=seen: seen.append(out.dtype)
        )
        trainer.update()
        assert set(seen) == {getattr(torch, precision)}


def test_the_best_loss_and_the_loss_scale_outlive_a_stop(config):
    config = change(config, "training", precision="float16")
    result, _ = run(config)
    found = checkpoints.find(config.run, "last")
    data = prepare(config.data, config.cache_dir)
    resolved = dataclasses.replace(config, model=found.model)
    resumed = Trainer(resolved, data, checkpoint=found)
    assert resumed.best_loss == result.best_loss
    assert resumed.best == (config.run / "best").read_text().strip()
    found.progress["scaler"]["scale"] = 1234.0
    resumed = Trainer(resolved, data, checkpoint=found)
    assert resumed.scaler.get_scale() == 1234.0


def test_what_is_logged_is_the_mean_loss_and_the_speed_of_training_alone(config, monkeypatch):
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
        return float(self.step), 1.0

    monkeypatch.setattr(Trainer, "evaluate", slow_evaluation)
    monkeypatch.setattr(Trainer, "update", two_second_step)
    config = change(change(config, "log", every=3), "training", precision="bfloat16")
    run(config)
    logged = [r for r in records(config) if "loss" in r]
    assert [r["loss"] for r in logged] == [2.0, 5.0, 8.0, 11.0]
    assert [r["tokens_per_second"] for r in logged] == [64.0] * 4
    flops = checkpoints.load_model(checkpoints.find(config.run)).flops_per_token()
    assert [r["mfu"] for r in logged] == pytest.approx([64 * flops / 1e9] * 4)
