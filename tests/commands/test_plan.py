"""gpt plan: its memory is that of a step, its answers follow from the configuration."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt.cli import main
from gpt.commands.gpus import GPUS
from gpt.config import PlanConfig, TrainConfig, parse
from gpt.device import PEAK_FLOPS
from gpt.model.gpt import GPT
from gpt.training import footprint, loss, timing
from gpt.training.footprint import Live, Planner, cache_bytes
from gpt.training.rehearsal import Rehearsal
from tests.test_cli import ROOT

SMALL = [
    "--model.vocab_size=61", "--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32",
    "--model.context_length=16", "--training.batch_tokens=512", "--training.micro_batch_size=8",
    "--training.device=cpu", "--training.max_steps=100", "--training.precision=float32",
]  # fmt: skip
SHAKESPEARE = str(ROOT / "configs" / "shakespeare.toml")


def config_of(*words, path=SHAKESPEARE):
    return parse(TrainConfig, [path, *SMALL, *words], prog="train.py")


def planner_of(*words, **options):
    settings = {"dtype": torch.float32, "fast": torch.float32, "for_gpu": False} | options
    return Planner(config_of(*words), **settings)


def answer(capsys, *words):
    assert main(["plan", SHAKESPEARE, *SMALL, "--json", "--no_measure", *words]) == 0
    return json.loads(capsys.readouterr().out)


VARIANTS = {
    "adamw": ["--optimizer.name=adamw"],
    "muon": [],
    "modern": [
        "--model.position=rotary", "--model.norm=rmsnorm", "--model.mlp=gated",
        "--model.activation=silu", "--model.n_kv_head=1", "--optimizer.name=adamw",
    ],
    "full": ["--training.activation_checkpointing=full", "--optimizer.name=adamw"],
    "selective": ["--training.activation_checkpointing=selective", "--optimizer.name=adamw"],
    "frozen": ["--training.freeze", "embed.*", "--optimizer.name=adamw"],
}  # fmt: skip


@pytest.mark.parametrize("variant", [*VARIANTS, "many positions"])
def test_fake_tensors_take_the_bytes_of_real_ones_but_for_some_scalars(variant, monkeypatch):
    if variant == "many positions":  # whose head is computed for some at a time
        monkeypatch.setattr(loss, "MIN_POSITIONS_PER_FEATURE", 0)
        monkeypatch.setitem(loss.LOGITS, "cpu", 32 * 61)
    planner = planner_of(*VARIANTS.get(variant, []))
    counted = planner.footprint(8, accumulates=False)
    cpu = torch.device("cpu")
    with Live() as live:
        step = Rehearsal(
            planner.config, n_layer=2, device=cpu, dtype=torch.float32, fast=torch.float32
        )
        weights = live.now
        assert weights == sum(p.nbytes for p in step.model.parameters())
        step.forward(1).backward()
        step.update()
        optimizer = live.now - weights
        live.restart()
        step.forward(8).backward()
        passes = live.peak
        live.restart()
        step.update()
    assert (counted.weights, counted.optimizer) == (weights, optimizer)
    assert counted.passes == pytest.approx(passes, abs=2048)
    assert counted.update == pytest.approx(live.peak, abs=2048)


def test_adamw_takes_16_bytes_for_each_parameter():
    found = planner_of("--optimizer.name=adamw").footprint(1, accumulates=False)
    parameters = found.weights / 4
    assert found.gradients == 4 * parameters
    assert found.optimizer == pytest.approx(8 * parameters, rel=0.01)


@pytest.mark.parametrize("pattern", ["GL", pytest.param("GGL", marks=pytest.mark.slow)])
def test_a_deep_model_is_extrapolated_exactly(pattern, monkeypatch):
    monkeypatch.setattr(footprint, "DEEP", 0)
    words = [f"--model.window_pattern={pattern}", "--model.window=4"]
    planner = planner_of("--model.n_layer=11", "--optimizer.name=adamw", *words)
    extrapolated = planner.footprint(4, accumulates=True)
    assert planner._counted.keys() != {(11, 4, True)}
    whole = planner._count(11, 4, True)
    assert extrapolated.weights == whole.weights
    assert extrapolated.passes == pytest.approx(whole.passes, rel=1e-3)
    assert extrapolated.update == pytest.approx(whole.update, rel=1e-3)


WIDE = [
    "--model.vocab_size=2000", "--model.n_embd=64", "--model.context_length=32",
    "--optimizer.name=adamw",
]  # fmt: skip


@pytest.mark.parametrize("deep", [0, footprint.DEEP])
def test_the_peak_of_many_layers_may_be_elsewhere_than_that_of_few(deep, monkeypatch):
    """The gradients of a large vocabulary are the peak of one layer, and the activations that of
    many."""
    monkeypatch.setattr(footprint, "DEEP", deep)
    planner = planner_of("--model.n_layer=24", *WIDE)
    one, two, whole = (planner._count(n, 1, True) for n in (1, 2, 24))
    assert one.passes + 23 * (two.passes - one.passes) < 0.95 * whole.passes
    found = planner.footprint(1, accumulates=True).passes
    assert found == pytest.approx(whole.passes, rel=0.05 if deep == 0 else 0)


def test_checkpointing_takes_less_memory_and_a_gpu_no_scores():
    kept = {
        mode: planner_of(f"--training.activation_checkpointing={mode}")
        .footprint(8, accumulates=True)
        .activations
        for mode in ("none", "selective", "full")
    }
    assert kept["full"] < kept["selective"] < kept["none"]
    half = {"dtype": torch.bfloat16, "fast": torch.bfloat16}
    long = ["--model.context_length=128", "--training.batch_tokens=1024"]
    cpu, gpu = (
        planner_of(*long, **half, for_gpu=on).footprint(2, accumulates=True) for on in (0, 1)
    )
    assert gpu.activations < cpu.activations  # on a CPU, bfloat16 trains with the plain formula


def test_a_gpu_computes_more_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(loss, "MIN_POSITIONS_PER_FEATURE", 0)
    monkeypatch.setattr(loss, "LOGITS", {"cpu": 32 * 4000, "gpu": 128 * 4000})
    words = ["--model.vocab_size=4000", "--optimizer.name=adamw"]
    cpu, gpu = (planner_of(*words, for_gpu=on).footprint(8, accumulates=True) for on in (0, 1))
    assert gpu.forward - cpu.forward > 90 * 4000 * 4


@pytest.mark.parametrize("rows", [1, 8])
def test_the_largest_micro_batch_is_the_same_whatever_is_counted_anyway(rows):
    planner = planner_of("--optimizer.name=adamw")
    five = planner.footprint(5, accumulates=True).peak
    assert planner.largest(five, rows=rows) == 5
    assert planner.largest(five - 1, rows=rows) == 4


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_checkpoint_and_an_average_are_copies(on_gpu):
    found = planner_of(for_gpu=on_gpu).footprint(1, accumulates=False)
    assert found.copies == (0 if on_gpu else found.weights + found.optimizer)
    average = ["--training.average_fraction=0.2"]
    averaged = planner_of(*average, for_gpu=on_gpu).footprint(1, accumulates=False)
    assert averaged.copies == found.copies + found.weights * (1 if on_gpu else 2)
    assert averaged.peak - averaged.copies == found.peak - found.copies


def test_an_adapters_checkpoint_copies_the_adapter_alone():
    found = planner_of("--init=any", "--adapter.kind=lora").footprint(1, accumulates=False)
    assert 0 < found.optimizer < found.copies < found.weights / 2


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    planner = planner_of()
    limit = planner.footprint(37, accumulates=True).peak + 100
    assert planner.largest(limit, rows=8) == 37
    assert planner.largest(1000, rows=8) == 0


def test_experts_are_counted_too():
    words = ["--model.n_expert=4", "--model.n_expert_active=2", "--optimizer.name=adamw"]
    found = planner_of(*words).footprint(8, accumulates=True)
    assert found.weights == 4 * sum(p.numel() for p in GPT(config_of(*words).model).parameters())
    assert found.passes > found.weights + found.gradients + found.optimizer


def test_the_cache_is_that_of_generation():
    model = config_of("--model.window_pattern=GL", "--model.window=4", "--model.n_layer=4").model
    real = GPT(model).new_cache().nbytes
    assert cache_bytes(model, torch.float32) == real
    assert cache_bytes(model, torch.float32, "int8") < real / 2


def test_the_answer_has_counts_of_the_configuration(capsys):
    found = answer(capsys)
    model = GPT(config_of().model)
    assert found["parameters"] == model.parameter_count()
    assert found["tokens"] == 512 * 100
    assert found["flops"] == model.flops_per_token() * 512 * 100
    assert found["chinchilla"] == 20 * model.parameter_count()
    assert found["seconds"] is None
    assert found["line"].startswith("python train.py ")
    assert "--json" not in found["line"]
    assert "--no_measure" not in found["line"]
    words = found["line"].split()[2:]
    assert parse(TrainConfig, words, prog="train.py") == config_of()


def test_outside_a_checkout_the_line_runs_the_package(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert answer(capsys)["line"].startswith("python -m gpt train ")
    two = answer(capsys, "--gpu", "h100", "--gpus", "2", "--training.precision=auto")
    assert two["line"].startswith("torchrun --nproc-per-node 2 -m gpt train ")


def test_a_plan_for_gpus_follows_from_their_peak(capsys):
    words = ("--training.precision=auto", "--gpu", "h100", "--mfu", "0.5")
    one, two = (answer(capsys, *words, "--gpus", str(n)) for n in (1, 2))
    assert one["seconds"] == pytest.approx(one["flops"] / (0.5 * 989e12))
    assert two["seconds"] == pytest.approx(one["seconds"] / 2)
    assert two["sequences"] == 16
    assert two["line"].startswith("torchrun --nproc-per-node 2 train.py ")
    assert "--training.micro_batch_size=16" in two["line"]


@pytest.mark.slow
def test_a_model_that_does_not_fit_one_gpu_is_sharded(capsys):
    words = ["plan", str(ROOT / "configs" / "gpt3_13b.toml"), "--gpu", "h100", "--json"]
    assert main([*words, "--gpus", "1"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (alone["micro_batch"], alone["place"]["strategy"]) == (0, "single")
    assert main([*words, "--gpus", "16"]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert shared["place"]["strategy"] == "fsdp"
    assert shared["micro_batch"] >= 1
    assert shared["memory"]["none"]["weights"] < alone["memory"]["none"]["weights"] / 8
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d" in shared["line"]


def test_the_table_of_gpus_has_known_peaks():
    for gpu in GPUS.values():
        assert gpu.known_as in PEAK_FLOPS
        assert "NVIDIA" in gpu.source


def test_measured_time_and_memory_are_told(capsys):
    words = ["plan", SHAKESPEARE, *SMALL, "--seconds", "0.2"]
    assert main(words) == 0
    output = capsys.readouterr()
    assert "measured here: the whole model" in output.out
    assert "largest micro batch" in output.out
    assert main([*words, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]["none"]
    assert memory["process"] > memory["peak"] > memory["activations"]


def killed(*about):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_that_is_killed_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(timing, "_measure", killed)
    assert main(["plan", SHAKESPEARE, *SMALL, "--seconds", "0.2"]) == 2
    assert "was killed, probably because memory ran out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective.distill=a,b"], "not counted: the teachers of objective.distill"),
        (["--training.scheduled_sampling=0.5"], "not counted: the first pass of training.sched"),
        ([], ""),
    ],
)
def test_what_is_not_counted_is_told(words, said, capsys):
    assert main(["plan", SHAKESPEARE, *SMALL, "--no_measure", *words]) == 0
    told = capsys.readouterr().err
    assert said in told if said else "not counted" not in told


def test_minutes_are_planned_as_the_steps_that_fit_into_them(capsys):
    words = [SHAKESPEARE, *SMALL, "--training.precision=auto", "--gpu=h100", "--json"]
    assert main(["plan", *words, "--training.max_steps=10"]) == 0
    ten = json.loads(capsys.readouterr().out)
    assert main(["plan", *words, "--training.max_minutes=2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"] == pytest.approx(120, rel=0.01)
    assert plan["steps"] == pytest.approx(120 / (ten["seconds"] / 10), rel=0.01)
    assert plan["tokens"] == plan["steps"] * ten["tokens"] / 10
    assert main(["plan", SHAKESPEARE, *SMALL, "--training.max_minutes=2", "--no-measure"]) == 2
    assert "how many steps fit into it is measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "2"], "gpus is 2, and needs their kind: --gpu h100"),
        (["--gpu", "h100", "--gpus", "3", "--training.precision=auto"], "3 GPUs cannot share them"),
        (["--gpu", "h100"], "training.precision is float32, and the table of GPUs"),
        (["--model.vocab_size=0", "--data.source=nothing.txt"], "nothing.txt"),
        (["--model.vocab_size=0", "--data.tokenizer=bpe"], "--model.vocab_size"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words, said, capsys):
    assert main(["plan", SHAKESPEARE, *SMALL, *words]) == 2
    assert said in capsys.readouterr().err


RUN = """
import json, re, sys, time
from gpt.cli import main
def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""
REAL = {
    "shakespeare": [SHAKESPEARE, "--training.max_steps=60", "--evaluation.every=20"],
    "gpt2_124m": [
        str(ROOT / "configs" / "gpt2_124m.toml"), "--training.batch_tokens=2048",
        "--training.micro_batch_size=1", "--training.max_steps=6", "--evaluation.every=3",
    ],
    "gpt2_124m, recomputed": [
        str(ROOT / "configs" / "gpt2_124m.toml"), "--training.batch_tokens=2048",
        "--training.micro_batch_size=1", "--training.max_steps=6", "--evaluation.every=3",
        "--training.activation_checkpointing=full",
    ],
    "modern_124m": [
        str(ROOT / "configs" / "modern_124m.toml"), "--training.batch_tokens=2048",
        "--training.micro_batch_size=1", "--training.max_steps=6", "--evaluation.every=3",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", REAL)
def test_the_plan_is_right_to_15_percent(name, tmp_path, capsys):
    """Against the peak of a real run above the memory of a run of one tiny step, and its time. The
    run has two checkpoints, and steps after the first."""
    words = [*REAL[name], "--training.device=cpu", "--evaluation.windows=1"]
    words += ["--evaluation.sample_tokens=0", "--log.every=1"]
    tiny = ["--model.n_layer=1", "--model.n_head=1", "--model.n_kv_head=0", "--model.n_inner=0",
            "--model.n_embd=16", "--model.context_length=16", "--training.batch_tokens=16",
            "--training.micro_batch_size=1", "--training.max_steps=1"]  # fmt: skip
    run = ["--run_dir", str(tmp_path / "run")]
    prepared = ["--data.cache_dir", str(tmp_path / "data")]
    _trained([*words, *tiny, *prepared, "--run_dir", str(tmp_path / "tiny")])  # prepares the text
    bare, _ = _trained([*words, *tiny, *prepared, "--run_dir", str(tmp_path / "bare")])
    peak, seconds = _trained([*words, *prepared, *run])
    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    training = parse(PlanConfig, words, prog="plan").training
    memory = plan["memory"][training.activation_checkpointing]
    planned, step = memory["process"], plan["step"]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{name}: {planned / 1e6:,.0f} MB planned ({memory['peak'] / 1e6:,.0f} counted), "
            f"{(peak - bare) / 1e6:,.0f} real; {step:.3g} s a step planned, {seconds:.3g} real\n"
        )
    assert planned == pytest.approx(peak - bare, rel=0.15)
    assert step == pytest.approx(seconds, rel=0.15)


def _trained(words):
    """The peak memory of a run, and its median seconds of a step, in a process of its own."""
    code = f"{RUN}\nassert main(['train', *{words!r}]) == 0\nprint(peak())"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, (done.stderr, time.monotonic() - start)
    path = Path(words[words.index("--run_dir") + 1]) / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [sum(v for k, v in r.items() if k.endswith("_seconds")) for r in records if "loss" in r]
    return int(done.stdout.splitlines()[-1]), statistics.median(steps)
