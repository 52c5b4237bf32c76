"""The program that measures recipes against the clock."""

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from gpt.cli import main as gpt

ROOT = Path(__file__).parents[2]


@pytest.fixture
def speedrun(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speedrun")


@pytest.fixture
def words(tmp_path, text_file):
    settings = tmp_path / "tiny.toml"
    settings.write_text(
        "[model]\ncontext_length = 16\nn_layer = 1\nn_head = 2\nn_embd = 32\n"
        "[training]\nmax_steps = 6\nbatch_tokens = 128\nmicro_batch_size = 8\n"
        f"[data]\nsource = {str(text_file)!r}\n"
    )
    return [str(settings), "--data.cache_dir", str(tmp_path / "data")]


def test_a_run_has_its_curve_of_seconds_and_losses(speedrun, words):
    figures = speedrun.run(words, 1, seconds=0, evaluations=3)
    assert figures["steps"] == 6
    seconds, losses = zip(*figures["curve"], strict=True)
    assert len(seconds) == 3
    assert sorted(seconds) == list(seconds)
    assert losses[0] > losses[-1]
    assert figures["tokens/s"] == pytest.approx(6 * 128 / seconds[-1])
    again = speedrun.run(words, 1, seconds=0, evaluations=3)
    assert [loss for _, loss in again["curve"]] == list(losses)


def test_a_run_is_planned_to_take_the_seconds(speedrun, words, monkeypatch):
    measured = mock.create_autospec(speedrun.budget.measure, return_value=(0.5, 1.0))
    monkeypatch.setattr(speedrun.budget, "measure", measured)
    growing = [*words, "--training.window_start", "4"]
    assert speedrun.run(growing, 1, seconds=2, evaluations=1)["steps"] == 4
    [trainer] = measured.call_args.args[:1]
    assert trainer.config.training.window_start == 0  # the longest steps


def test_a_student_learns_from_its_teacher(speedrun, words, tmp_path, monkeypatch):
    teacher, seen = str(tmp_path / "teacher"), []
    assert gpt(["train", *words, "--run_dir", teacher]) == 0
    made = speedrun.Trainer
    monkeypatch.setattr(
        speedrun, "Trainer", lambda *args, **own: seen.append(own["teachers"]) or made(*args, **own)
    )
    speedrun.run([*words, "--objective.distill", teacher], 1, seconds=0, evaluations=1)
    assert [len(teachers) for teachers in seen] == [1]


def test_rows_are_compared_in_a_table_and_a_picture(speedrun, words, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the extra docs draws it", exc_type=ImportError)
    asked = []

    def measured(settings, seed, seconds, evaluations):
        asked.append((settings[1:], seed))
        faster = "--model.mlp" in settings
        curve = [[10.0, 2.5], [20.0, (1.8 if faster else 2.0) + seed / 100]]
        return {"parameters": 9000, "steps": 7, "tokens/s": 90.4, "curve": curve}

    monkeypatch.setattr(speedrun, "in_a_process", measured)
    kept, picture = tmp_path / "kept.json", tmp_path / "curves.png"
    options = [
        words[0], "--seeds", "1,3", "--row", "gated: --model.mlp gated", "--json", str(kept),
        "--png", str(picture), "--", *words[1:],
    ]  # fmt: skip
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["speedrun.py", *options])
        speedrun.main()
    assert [seed for _, seed in asked] == [1, 1, 3, 3]
    assert asked[1][0] == [*words[1:], "--model.mlp", "gated"]
    assert len(json.loads(kept.read_text())) == 4
    said = capsys.readouterr().out
    assert "| as it is | 9,000 | 7 | 90 | 20.0 ± 0.0 | 2.0200 ± 0.0100 | not reached |" in said
    assert "| gated | 9,000 | 7 | 90 | 20.0 ± 0.0 | 1.8200 ± 0.0100 | 19.0 ± 0.1 |" in said
    assert picture.stat().st_size > 1000


def test_another_content_of_the_file_is_measured_again(speedrun, words, tmp_path, monkeypatch):
    figures = {"parameters": 1, "steps": 1, "tokens/s": 1.0, "curve": [[1.0, 2.0]]}
    asked, kept = [], str(tmp_path / "kept.json")
    monkeypatch.setattr(speedrun, "in_a_process", lambda *about: asked.append(about) or figures)
    monkeypatch.setattr(
        sys, "argv", ["speedrun.py", words[0], "--seeds", "1", "--json", kept, "--", *words[1:]]
    )
    speedrun.main()
    speedrun.main()
    assert len(asked) == 1
    settings = Path(words[0])
    settings.write_text(settings.read_text() + "\n[optimizer]\nlearning_rate = 0.1\n")
    speedrun.main()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nothing.toml"], "nothing.toml is not a file"),
        (["--seeds", "one"], "--seeds is 'one', and must be numbers such as 1,2,3"),
        (["--evaluations", "0"], "--evaluations must be at least 1"),
        (["--json", "broken"], "cannot be read"),
        (["--run", "1", "--", "--model.n_head=3"], "n_head"),
        (["--run", "1", "--", "--init", "gpt2"], "init is set, and speedrun.py compares runs of"),
    ],
)
def test_a_mistake_is_one_sentence(options, said, speedrun, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken").write_text("{")
    config = [] if options[0].endswith(".toml") else [words[0]]
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *config, *options])
    with pytest.raises(SystemExit) as ended:
        speedrun.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
