"""The same result on any number of processes: two and four, with gloo on the CPU."""

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import gpt
from gpt import checkpoint as checkpoints
from gpt.cli import main
from gpt.config import CheckpointConfig, ModelConfig, ParallelConfig, UsageError
from gpt.model.gpt import parameter_count
from gpt.training.build import saves_shards
from gpt.training.parallel import World, _meet, choose_strategy
from gpt.training.setup import sequences_a_step
from tests.conftest import LINES
from tests.training.tasks import make_start, write_records
from tests.training.worker import (
    COMPOSITES,
    FORMATS,
    KINDS,
    MADE,
    MICRO,
    RESUMED,
    USUAL,
    family,
    run_of,
    train,
)

ROOT = Path(__file__).parent.parent.parent
WORLDS = {1: ("single",), 2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hybrid")}
PLACES = [(n, strategy) for n, strategies in WORLDS.items() for strategy in strategies]
RUNS = [(n, s, f) for n, s in PLACES[1:] for f in FORMATS.get(s, ("full",))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A folder with the results of worker.py on one, two and four processes."""
    place = tmp_path_factory.mktemp("parallel")
    write_records(place / "records.jsonl")
    make_start(place)
    sums = ({"prompt": f"{i}+1=", "completion": str(i + 1) * (1 + i % 3)} for i in range(60))
    (place / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    (place / "text.txt").write_text("".join(LINES[i % 3] for i in range(160)))
    words = [str(ROOT / "tests/training/worker.py"), str(place)]
    if any(
        item.path == request.path and item.get_closest_marker("slow")
        for item in request.session.items
    ):
        words.append("--all")
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def results(folder):
    return {n: torch.load(folder / f"{n}.pt", weights_only=False) for n in WORLDS}


def difference(one, two):
    """The relative difference of all gradients together, and of the worst parameter."""
    names = [name for name in two if name not in ("loss", "norm")]
    assert one.keys() == two.keys()
    apart = [(one[n].double() - two[n].double()).norm() for n in names]
    sizes = [two[n].double().norm() for n in names]
    worst = max(a / s for a, s in zip(apart, sizes, strict=True))
    return (torch.stack(apart).norm() / torch.stack(sizes).norm()).item(), worst.item()


@pytest.mark.parametrize("kind", ["gradients", "head in chunks", "masked", "documents"])
@pytest.mark.parametrize(
    ("n", "strategy", "micro"), [(n, s, micro) for n, s in PLACES for micro in MICRO[n]]
)
def test_gradients_are_the_same_however_a_step_is_split(n, strategy, micro, kind, results):
    whole = results[1]["single", "gradients" if kind == "head in chunks" else kind, 8]
    split = results[n][strategy, kind, micro]
    assert max(difference(split, whole)) < 1e-6
    assert split["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-6)
    assert split["norm"].item() == pytest.approx(whole["norm"].item(), rel=1e-6)


PIECES = [*COMPOSITES, "lora", "bottleneck", "frozen"]


@pytest.mark.parametrize(
    ("n", "strategy", "kind"),
    [*((n, s, kind) for n, s in PLACES[1:] for kind in PIECES), (2, "ddp", "over int4")],
)
def test_gradients_of_composite_models_are_those_of_one_process(n, strategy, kind, results):
    split, whole = results[n][strategy, kind], results[1]["single", kind]
    assert max(difference(split, whole)) < 1e-5
    assert split["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-6)
    assert split["norm"].item() == pytest.approx(whole["norm"].item(), rel=1e-5)


@pytest.mark.parametrize(("n", "strategy"), PLACES[1:])
def test_learning_rates_by_pattern_are_those_of_one_process(n, strategy, results):
    whole = results[1]["single", "rates"]
    torch.testing.assert_close(results[n][strategy, "rates"], whole, rtol=1e-5, atol=0)
    assert (whole - results[1]["single", "muon"]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_resume_an_objective_bit_for_bit(strategy, kind, results):
    assert results[2][strategy, "again", kind]


def rows_of(strategy):
    """Those of the usual run, and the others as slow."""
    usual = family(strategy, all_rows=False)
    return [
        pytest.param(strategy, row, marks=() if row in usual else pytest.mark.slow)
        for row in family(strategy)
    ]


@pytest.mark.parametrize(("strategy", "row"), [*rows_of("ddp"), *rows_of("fsdp")])
def test_every_two_techniques_give_the_gradients_of_one_process(row, strategy, results):
    """In the usual run two thirds of the pairs, and every technique with every strategy."""
    split, whole = results[2][strategy, row], results[1]["single", row]
    assert split.keys() == whole.keys()
    assert max(difference(split, whole)) < 1e-5
    assert split["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_from_records_as_one_does(strategy, kind, results):
    split, whole = results[2][strategy, kind], results[1]["single", kind]
    assert split["texts"] == whole["texts"]
    assert max(difference(split["gradients"], whole["gradients"])) < 1e-4
    assert split["figures"] == pytest.approx(whole["figures"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_from_instructions_as_one_does(strategy, results):
    split, whole = results[2][strategy, "instructions"], results[1]["single", "instructions"]
    assert max(difference(split, whole)) < 1e-5
    assert split["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["scheduled", "distilled"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_replace_the_tokens_and_learn_from_the_teachers_that_one_does(
    strategy, kind, results
):
    split, whole = results[2][strategy, kind], results[1]["single", kind]
    assert max(difference(split, whole)) < 1e-5
    plain = results[1]["single", "gradients", 2]
    assert difference(whole, plain)[0] > 0.1


@pytest.mark.parametrize("kind", ["masked", "documents"])
def test_other_windows_change_the_gradients(
    kind, results
):  # or the test above says nothing of them
    assert difference(results[1]["single", kind, 8], results[1]["single", "gradients", 8])[0] > 0.1


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize(("n", "strategy"), PLACES)
def test_activation_checkpointing_changes_no_bit(n, strategy, kind, results):
    plain = results[n][strategy, "gradients", 2]
    assert all(torch.equal(plain[k], v) for k, v in results[n][strategy, kind].items())


@pytest.mark.parametrize(("n", "strategy"), PLACES)
def test_new_weights_are_bit_identical_when_made_part_by_part(n, strategy, results):
    plain = results[1]["single", "new"]
    assert all(torch.equal(plain[name], v) for name, v in results[n][strategy, "new"].items())


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("bfloat16", 1e-3), ("float16", 1e-3), ("muon", 1e-3)]
)
@pytest.mark.parametrize(("n", "strategy"), PLACES)
def test_training_in_low_precision_is_the_same_within_rounding(
    n, strategy, kind, tolerance, results
):
    one = results[1]["single", kind]
    assert one[0] - one[-1] > 0.05  # it learns
    assert results[n][strategy, kind].tolist() == pytest.approx(one.tolist(), abs=tolerance)


@pytest.mark.parametrize(("n", "strategy"), PLACES)
def test_an_overflow_of_float16_skips_the_update_everywhere_and_halves_the_scale(
    n, strategy, results
):
    assert results[n][strategy, "overflow"] == (True, 2.0**29)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_records(run, other):
    assert [r["step"] for r in records(run)] == [r["step"] for r in records(other)]
    for one, two in zip(records(run), records(other), strict=True):
        for key in {"loss", "validation_loss", "gradient_norm"} & two.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-6), (key, one["step"])


@pytest.mark.parametrize(("n", "strategy", "kind"), RUNS)
def test_a_run_has_the_metrics_and_the_weights_of_one_process(n, strategy, kind, folder, results):
    run = folder / f"{strategy}-{n}-{kind}"
    assert_same_records(run, folder / "single-1-full")
    model, expected = gpt.load(run).model, gpt.load(folder / "single-1-full").model
    for name, parameter in expected.named_parameters():
        # a key's bias has a gradient of 0 except for rounding, from which Adam makes a step
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=2e-5)
    said = results[n][strategy, kind, "said"]
    assert f"{'fsdp' if strategy == 'hybrid' else strategy} on {n} processes" in said
    [shards] = {p.is_dir() for p in run.glob("checkpoints/*/model*")}
    assert shards == (kind == "sharded")


def resumptions():
    """All runs and worlds that can resume them; those that the usual run lacks as slow."""
    for made in MADE:
        for n, strategy in PLACES[1:]:
            if n > int(made.split("-")[1]):
                world = f"{strategy}-{n}"
                marks = () if world in USUAL.get(made, ()) else pytest.mark.slow
                yield pytest.param(made, world, marks=marks)


@pytest.mark.parametrize(("made", "world"), list(resumptions()))
def test_a_run_can_be_resumed_by_more_processes(made, world, folder):
    """In the usual run each of these worlds resumes one run."""
    assert_same_records(folder / f"{made}-on-{world}", folder / "single-1-full")


@pytest.mark.parametrize("made", MADE)
def test_a_run_can_be_resumed_by_one_process(made, folder):
    config = dataclasses.replace(run_of(folder, f"{made}-on-one"), resume=True)
    (folder / f"{made}-on-one").mkdir()
    for name in ("checkpoints/step-00000003", "config.toml", "tokenizer.json", "metrics.jsonl"):
        target = folder / f"{made}-on-one" / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(folder / made / name)
    (folder / f"{made}-on-one" / "metrics.jsonl").unlink()
    said = train(config, World())
    assert "continuing from step 3" in said
    assert checkpoints.find(config.run, "last").step == 6
    last = [r for r in records(folder / "single-1-full") if r["step"] > 3]
    assert [r["step"] for r in records(config.run)] == [r["step"] for r in last]
    for one, two in zip(records(config.run), last, strict=True):
        for key in {"loss", "validation_loss"} & two.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-6)


def test_one_process_writes_the_sample_even_if_weights_are_sharded(results):
    assert results[1]["single", "full", "samples"] == 3
    for n, strategy in PLACES[1:]:
        assert results[n][strategy, "full", "samples"] == 3
        assert "│ a sample" in results[n][strategy, "full", "said"]


def test_a_sharded_model_is_sampled_from_and_exported(folder, tmp_path):
    run = folder / "hybrid-4-sharded"
    [one], [two] = (
        gpt.generate(gpt.load(folder / name), "ALL:", temperature=0, max_new_tokens=20)
        for name in ("single-1-full", "hybrid-4-sharded")
    )
    assert one.text == two.text
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(exported(tokens).logits, gpt.load(run).model(tokens))


@pytest.mark.parametrize("damaged", ["model", "training"])
def test_a_damaged_shard_is_passed_over(damaged, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "fsdp-2-sharded", run)
    shard = next((run / "checkpoints" / "step-00000006" / damaged).iterdir())
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    said = []
    assert checkpoints.find(run, "last", say=said.append).step == 3
    assert f"damaged: {damaged}/{shard.name}" in said[0]


def test_all_processes_get_the_largest_number(results):
    assert [results[n]["largest"] for n in WORLDS] == [0, 1, 3]


@pytest.mark.parametrize(
    ("n", "device", "memory", "wanted", "chosen"),
    [
        (1, "cuda", 80e9, "auto", "single"),
        (1, "cuda", 80e9, "fsdp", "single"),
        (8, "cpu", None, "auto", "ddp"),
        (8, "cuda", 80e9, "auto", "ddp"),
        (8, "cuda", 24e9, "auto", "fsdp"),
        (8, "cuda", 24e9, "ddp", "ddp"),
        (8, "cpu", None, "fsdp", "fsdp"),
        (8, "cuda", 80e9, "shard_size", "fsdp"),
    ],
)
def test_auto_shards_a_state_that_fills_half_a_gpu(n, device, memory, wanted, chosen, monkeypatch):
    class Properties:
        total_memory = memory

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    config = (
        ParallelConfig(shard_size=4) if wanted == "shard_size" else ParallelConfig(strategy=wanted)
    )
    world = World(size=n)
    assert chosen == choose_strategy(
        config, world, n_parameters=1_000_000_000, device=torch.device(device)
    )


def test_an_unequal_division_is_an_error_that_says_what_fits():
    with pytest.raises(
        UsageError, match="128, 8 sequences, which 3 processes .* 144 is the nearest"
    ):
        sequences_a_step(128, 16, World(size=3))
    with pytest.raises(UsageError, match="shard_size is 2, and parallel.strategy is ddp, which"):
        ParallelConfig(strategy="ddp", shard_size=2)
    with pytest.raises(UsageError, match="shard_size is 3, and must divide .* \\(4\\)"):
        choose_strategy(
            ParallelConfig(shard_size=3), World(size=4), n_parameters=1, device=torch.device("cpu")
        )


def test_each_window_belongs_to_one_process():
    windows = np.arange(24)
    shares = [World(rank=rank, size=4).split(windows) for rank in range(4)]
    assert np.concatenate(shares).tolist() == windows.tolist()


def test_checkpoints_are_full_if_the_host_can_hold_the_state(monkeypatch):
    model, checkpoint = ModelConfig(), CheckpointConfig()
    assert parameter_count(model) == 124_439_808  # 2 GB of state
    for memory, shards in ((10e9, False), (3e9, True)):
        monkeypatch.setattr(os, "sysconf", lambda name, m=memory: 1 if "SIZE" in name else m)
        assert saves_shards(checkpoint, model, "fsdp") == shards
        assert not saves_shards(checkpoint, model, "ddp")


@pytest.mark.parametrize("n", [2, 4])
def test_processes_wait_for_each_other_for_days(n, results):
    assert results[n]["patience"] >= datetime.timedelta(days=1)


def test_a_restarted_job_knows_only_its_own_runs():
    store = torch.distributed.HashStore()
    first = World(store=torch.distributed.PrefixStore("a", store), job=store)
    assert not first.remembers("runs/x")
    first.remember("runs/x")
    again = World(store=torch.distributed.PrefixStore("b", store), job=store)
    assert again.remembers("runs/x")
    assert not again.remembers("runs/y")
    assert not World().remembers("runs/x")


def test_the_processes_of_one_start_find_each_other_despite_earlier_starts():
    """Three starts on one store; the second one is killed during its meeting."""
    job = torch.distributed.HashStore()

    def meet(n):
        with ThreadPoolExecutor(n) as pool:
            for store in pool.map(lambda rank: _meet(job, rank, n), reversed(range(n))):
                store.add("present", 1)
                yield store

    for n in (3, 2, 3, 5):
        stores = list(meet(n))
        assert [int(store.get("present")) for store in stores] == [n] * n
        job.set("meeting", "called by one that was killed then")


def test_results_and_errors_of_the_main_process_are_broadcast():
    store = torch.distributed.HashStore()
    worlds = [World(rank, 2, store=store) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(
            pool.map(lambda world: world.broadcast(lambda: f"of {world.rank}"), worlds)
        ) == [
            "of 0",
            "of 0",
        ]

        def fail():
            raise UsageError("no such thing")

        for outcome in [pool.submit(world.broadcast, fail) for world in worlds]:
            with pytest.raises(UsageError, match="no such thing"):
                outcome.result()
    assert [world.fails_first() for world in worlds] == [True, False]


class GoneStore:
    def add(self, key, number):
        raise torch.distributed.DistNetworkError("Failed to recv")


def test_a_process_that_outlives_the_store_reports_the_error_itself():
    assert World(1, 2, store=GoneStore()).fails_first()
