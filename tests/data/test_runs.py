"""Runs on sources that are no plain file, from the command line and resumed."""

import os
import tomllib
from pathlib import Path

import pytest

from gpt.cli import main
from gpt.config import DataConfig, TrainConfig
from tests.data.test_piped import TEXT, piped

CONFIG = Path(__file__).parent.parent.parent / "configs" / "shakespeare.toml"
TINY = [
    "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.context_length=16",
    "--training.batch_tokens=128", "--training.micro_batch_size=8", "--training.device=cpu",
    "--evaluation.windows=2", "--evaluation.sample_tokens=0",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a text in it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def train(capsys):
    def train(*words, steps=2):
        toml, own = str(CONFIG), TINY
        if words[0].endswith(".toml"):
            toml, *words, own = *words, []
        words = [toml, *own, f"--training.max_steps={steps}", *words]
        status = main(["train", *words], prog="train.py")
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return train


def source_of(run):
    return tomllib.loads((run / "config.toml").read_text())["data"]["source"]


def test_a_run_on_a_pipe_is_resumed_without_it_also_where_it_was_moved_to(folder, train):
    with piped(TEXT) as source:
        status, output = train("--data.source", source)
    assert status == 0, output
    run = Path("runs/piped")
    assert Path(source_of(run)).read_bytes() == TEXT
    assert Path(source_of(run)).parent == run / "data"
    status, output = train(str(run / "config.toml"), "--resume", steps=4)
    assert status == 0, output
    assert "continuing from step 2" in output
    with piped(TEXT) as source:  # the same text again
        status, output = train("--data.source", source, "--resume", steps=6)
    assert status == 0, output
    assert "continuing from step 4" in output
    assert len(list((run / "data").glob("piped-*.txt"))) == 1
    moved = run.rename("moved")
    status, output = train(str(moved / "config.toml"), "--resume", steps=8)
    assert status == 0, output
    assert "continuing from step 6" in output
    with piped(TEXT + b"!") as source:
        status, output = train("--data.source", source, "--run_dir", "moved", "--resume", steps=9)
    assert status == 2
    assert "the text's fingerprint was" in output


def test_standard_input_is_a_source(folder, train):
    kept = os.dup(0)
    with piped(TEXT) as source:
        os.dup2(int(source.rpartition("/")[2]), 0)
        try:
            status, output = train("--data.source=-")
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    assert status == 0, output
    assert Path(source_of(Path("runs/piped"))).read_bytes() == TEXT


def test_a_pipe_is_not_read_for_a_run_that_may_not_start(folder, train):
    assert train("--data.source", "a.txt", "--run_dir", "run")[0] == 0
    with piped(TEXT) as source:
        status, output = train("--data.source", source, "--run_dir", "run")
        assert status == 2
        assert "holds a run at step 2 already" in output
        assert os.read(int(source.rpartition("/")[2]), 7) == TEXT[:7]


@pytest.mark.parametrize(
    ("source", "words", "run"),
    [
        (".", [], "runs/texts"),
        ("..", [], "runs/whole"),
        (".", ["--run_dir", "a run"], "a run"),
        (".", ["--data.cache_dir", "cache"], "runs/texts"),
    ],
)
def test_a_run_among_its_own_text_is_no_part_of_it(source, words, run, folder, train, monkeypatch):
    if source == "..":
        folder.parent.rename(folder.parent.with_name("whole"))
        folder = folder.parent.with_name("whole") / folder.name
        monkeypatch.chdir(folder)
    status, output = train("--data.source", source, *words)
    assert status == 0, output
    status, output = train("--data.source", source, *words, "--resume", steps=4)
    assert status == 0, output
    assert "continuing from step 2" in output
    status, output = train(str(Path(run, "config.toml")), "--resume", steps=6)
    assert status == 0, output
    assert "continuing from step 4" in output


def test_a_run_in_the_folder_of_its_text_is_refused_before_it_is_written(folder, train):
    status, output = train("--data.source", ".", "--run_dir", str(folder))
    assert status == 2
    assert "which is the folder of the text; choose another one" in output
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("books/my_book.txt", "my_book"),
        (".", "texts"),
        ("a/..", "texts"),
        ("/", "text"),
        ("-", "piped"),
        ("hf://owner/tales?split=test", "tales"),
    ],
)
def test_a_run_has_the_name_of_its_text(source, name, folder):
    assert TrainConfig(data=DataConfig(source=source)).run == Path("runs", name)


def test_what_is_read_in_place_of_a_named_corpus_is_said(folder, train):
    Path("shakespeare").write_bytes(TEXT)
    status, output = train("--data.source", "shakespeare")
    assert status == 0, output
    assert output.count("is the file in this folder, not the named corpus") == 1


def test_a_damaged_shard_is_noticed_when_a_run_is_resumed(folder, train):
    assert train("--data.source", "a.txt")[0] == 0
    [path] = Path("runs/a/data").glob("*/train.bin")
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    status, output = train("--data.source", "a.txt", "--resume", steps=4)
    assert status == 2
    assert "train.bin is damaged" in output


def test_brackets_in_the_name_of_a_text_are_shown(folder, capsys):
    Path("book [draft] [b].txt").write_bytes(TEXT)
    assert main(["prepare", "book [draft] [b].txt", "--out", "data [b]"]) == 0
    assert "data [b]: " in capsys.readouterr().out
