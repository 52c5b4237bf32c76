"""The preparation of a run, from the command line."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.cli import main
from gpt.config import TrainConfig, parse_training
from gpt.interop.load import load

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--model.context_length 32 --model.n_layer 1 --model.n_head 2 --model.n_embd 32 "
    "--training.max_steps 4 --training.batch_tokens 256 --training.micro_batch_size 8 "
    "--training.device cpu --training.precision float32 "
    "--evaluation.every 2 --evaluation.windows 2 --evaluation.sample_tokens 0"
)


@pytest.fixture
def place(text_file, tmp_path, monkeypatch):
    """A folder to work in, with a text in it."""
    folder = tmp_path / "place"
    folder.mkdir()
    text_file.rename(folder / "book.txt")
    monkeypatch.chdir(folder)
    return folder


def train(*words):
    return main(["train", *words], prog="train.py")


def steps(run):
    return sorted(int(path.name[5:]) for path in (Path(run) / "checkpoints").glob("step-*"))


GIANTS = {
    "layers": (["--model.n_layer", "1000000000"], "GB, and this machine has"),
    "vocabulary": (["--model.vocab_size", "1000000000000"], "GB, and this machine has"),
    "width": (["--model.n_embd", "300000", "--model.n_head", "3"], "GB, and this machine has"),
    "any width": (["--model.n_embd", str(2**60)], "GB, and this machine has"),
    "batch": (
        ["--training.micro_batch_size", "1000000000", "--training.batch_tokens", "32000000000"],
        "GB, and this machine has",
    ),
}


@pytest.mark.parametrize(("words", "said"), GIANTS.values(), ids=list(GIANTS))
def test_a_run_that_needs_too_much_memory_is_refused_before_it_is_built(words, said, place, capsys):
    assert train("--data.source", "book.txt", *SMALL, *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert steps("runs/book") == []


def test_a_moved_run_continues_in_its_new_place(place):
    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 0
    Path("R").rename("R2")
    assert train("R2/config.toml", "--resume", "--training.max_steps", "6") == 0
    assert steps("R2")[-1] == 6
    assert not Path("R").exists()


def test_a_copied_run_leaves_the_first_one_unchanged(place, capsys):
    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 0
    shutil.copytree("R", "R2")
    assert train("R2/config.toml", "--resume", "--training.max_steps", "6") == 0
    assert (steps("R")[-1], steps("R2")[-1]) == (4, 6)
    assert train("R2/config.toml") == 2  # not the run at R, and not from its start
    assert "R2 holds a run at step 6 already" in capsys.readouterr().err


def test_a_resumed_run_takes_its_own_settings_as_defaults(place, capsys):
    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 0
    capsys.readouterr()
    assert train("--run_dir", "R", "--resume", "--training.max_steps", "6") == 0
    assert "settings R/config.toml, then the command line" in capsys.readouterr().err
    assert steps("R")[-1] == 6
    assert train("--data.source", "book.txt", *SMALL) == 0
    assert train("--data.source=book.txt", "--resume", "--training.max_steps=6") == 0
    assert steps("runs/book")[-1] == 6


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ([], "default"),
        (["--resume"], "default"),
        (["--init", "gpt2"], "init"),
        (["--init=gpt2", "--run-dir", "none", "--resume"], "init"),
        (["--run_dir"], "default"),
    ],
)
def test_settings_come_from_the_preset_that_fits(words, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    presets = {"default": ROOT / "configs/shakespeare.toml", "init": ROOT / "configs/finetune.toml"}
    presets["schema"] = TrainConfig
    if words == ["--run_dir"]:
        with pytest.raises(SystemExit):
            parse_training(words, prog="train.py", **presets)
        return
    config, settings = parse_training(words, prog="train.py", **presets)
    assert isinstance(config, TrainConfig)
    assert settings == presets[path]


@pytest.fixture
def foreign(place):
    """A pretrained model in Hugging Face's layout, with a context of 32."""
    assert train("--data.source", "book.txt", "--run_dir", "pretrained", *SMALL) == 0
    assert main(["export", "pretrained", "G"]) == 0
    return load("G").model


def test_a_pretrained_model_keeps_its_context_and_is_not_ruined(foreign, capsys):
    few = ["--training.max_steps", "4", "--evaluation.every", "2", "--training.batch_tokens", "512"]
    capsys.readouterr()
    assert train("--init", "G", "--data.source", "book.txt", "--run_dir", "tuned", *few) == 0
    out, err = capsys.readouterr()
    assert "settings" in err
    assert "finetune.toml" in err
    assert "adamw" in out
    assert "muon" not in out
    assert "cropped" not in out
    assert load("tuned").model.config.context_length == 32
    losses = [float(x) for x in re.findall(r"validation (\d+\.\d+) nats", out)]
    assert losses[-1] < losses[0] + 0.005


def test_a_cropped_context_is_reported_and_a_longer_one_refused(foreign, capsys):
    words = ["--init", "G", "--data.source", "book.txt", "--training.max_steps", "1"]
    words += ["--training.batch_tokens", "64", "--evaluation.windows", "1"]
    assert train(*words, "--run_dir", "a", "--model.context_length", "16") == 0
    assert "context of 32 tokens is cropped to 16" in capsys.readouterr().out
    assert train(*words, "--run_dir", "b", "--model.context_length", "64",
                 "--training.batch_tokens", "256") == 2  # fmt: skip
    assert "has only 32 positions" in capsys.readouterr().err


def test_a_shape_that_init_ignores_is_reported(foreign, capsys):
    words = ["--init", "G", "--data.source", "book.txt", "--training.max_steps", "1"]
    words += ["--training.batch_tokens", "128", "--evaluation.windows", "1"]
    assert train(*words, "--model.n_layer", "3") == 0
    assert "model.n_layer is 3, but G keeps its own: 1" in capsys.readouterr().out


def test_a_rotary_model_is_trained_on_with_a_longer_context(place, capsys):
    words = ["--data.source", "book.txt", *SMALL, "--model.position", "rotary"]
    assert train(*words, "--run_dir", "short") == 0
    words = shlex.split(
        "--init short --run_dir long --data.source book.txt --model.position rotary "
        "--model.context_length 64 --model.rotary_scaling yarn --model.rotary_scaling_factor 2 "
        "--training.batch_tokens 256 --training.max_steps 1 --evaluation.windows 1"
    )
    assert train(*words) == 0
    said = "context of 32 tokens becomes 64, rotary_scaling yarn, rotary_scaling_factor 2.0"
    assert said in capsys.readouterr().out
    config = load("long").model.config
    assert (config.context_length, config.rotary_trained_length) == (64, 32)
    assert config.rotary_scaling == "yarn"
    assert train("--run_dir", "long", "--resume", "--training.max_steps", "2") == 0
    assert load("long").model.config == config


def test_a_context_of_0_needs_a_model_to_take_it_from(place, capsys):
    assert train("--data.source", "book.txt", *SMALL, "--model.context_length", "0") == 2
    assert "context_length is 0" in capsys.readouterr().err


def test_best_so_far_means_better_than_before_training(place, capsys):
    words = ["--data.source", "book.txt", "--run_dir", "R", *SMALL]
    assert train(*words, "--optimizer.learning_rate", "3e-3") == 0
    words = "--init R --data.source book.txt --run_dir worse --training.max_steps 2 "
    words += "--evaluation.every 1 --training.batch_tokens 512 --optimizer.learning_rate 9 "
    assert train(*words.split(), "--optimizer.warmup_steps", "0") == 0
    out = capsys.readouterr().out.split("run      worse")[1]
    assert "step 2: validation" in out
    assert "best so far" not in out
    # and also after a stop
    assert train("--run_dir", "worse", "--resume", "--training.max_steps", "4") == 0
    assert "best so far" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ['{"step":"x"}', '{"step": 1, "loss": null}', "[1]", '{"step": 1', "[" * 100_000,
     '{"step": 1, "loss": NaN}', '{"step": true}', "\xff", '{"loss": 1}', "3"],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_invalid_lines_in_the_metrics_are_skipped(line, place):
    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 0
    before = Path("R/metrics.jsonl").read_text()
    Path("R/metrics.jsonl").write_text(f"{line}\n{before}{line}\n")
    assert train("R/config.toml", "--resume", "--training.max_steps", "6") == 0
    lines = [json.loads(x) for x in Path("R/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "validation_loss" in r] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("field", "value"),
    [("losses", "x"), ("losses", ["x"]), ("best", 3), ("best_loss", "x"), ("skipped", None),
     ("scaler", []), ("settings", 1), ("place", [])],
)  # fmt: skip
def test_invalid_progress_is_an_error_that_names_it(field, value, place, capsys):
    from gpt import checkpoint as checkpoints

    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 0
    for path in Path("R/checkpoints").iterdir():
        meta = json.loads((path / "meta.json").read_text())
        meta["progress"][field] = value
        del meta["sha256"]
        meta["sha256"] = checkpoints._checksum(meta)
        (path / "meta.json").write_text(json.dumps(meta))
    assert train("R/config.toml", "--resume", "--training.max_steps", "6") == 2
    assert re.search(f"progress has .* as {field}|losses", capsys.readouterr().err)
    assert steps("R")[-1] == 4


def test_a_file_where_the_run_should_be_is_named(place, capsys):
    Path("R").write_text("mine")
    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 2
    assert "R cannot be written: File exists" in capsys.readouterr().err
    assert Path("R").read_text() == "mine"


def test_a_lock_that_is_a_link_is_not_followed(place, capsys):
    Path("R").mkdir()
    Path("victim").write_text("mine")
    Path("R/.lock").symlink_to(place / "victim")
    assert train("--data.source", "book.txt", "--run_dir", "R", *SMALL) == 2
    assert ".lock is a link" in capsys.readouterr().err
    assert Path("victim").read_text() == "mine"


LONG = [*SMALL, "--training.max_steps", "100000", "--log.every", "1"]


def started(*, stdout):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--data.source", "book.txt", *LONG],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def hangups():
    """SIGHUP is not ignored, unlike under nohup; child processes inherit this."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
def test_a_closed_terminal_makes_the_run_save_and_stop(place):
    with started(stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("step      3/"):
                process.send_signal(signal.SIGHUP)
                break
        rest = process.stdout.read()
        assert process.wait() == 128 + signal.SIGHUP
    assert "which is saved" in rest
    assert len(steps("runs/book")) >= 1


def test_ignored_signals_stay_ignored(place):
    from gpt.training.interrupt import Interrupt

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
        assert interrupt.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_exits_makes_the_run_save_and_stop(place):
    with started(stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("step      3/"):
                process.stdout.close()
                break
        error = process.stderr.read()
        assert process.wait() == 128 + signal.SIGTERM
    assert error == ""
    assert len(steps("runs/book")) >= 1
