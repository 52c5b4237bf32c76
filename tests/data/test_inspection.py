"""What ``gpt inspect`` says is what is there."""

import json

import numpy as np
import pytest

from gpt.cli import main
from gpt.config import DataConfig, PrepareConfig
from gpt.data.inspection import histogram, inspect
from gpt.data.preparation import prepare_corpus
from gpt.data.prepared import read_corpus
from gpt.data.tokenizer import ByteTokenizer

TEXTS = ["a" * n for n in range(1, 40)] + ["é" * 20]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    data = DataConfig(tokenizer="byte", validation_fraction=0.1)
    config = PrepareConfig(
        sources=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", data=data, shard_tokens=300,
        validation="documents",
    )  # fmt: skip
    prepare_corpus(config, lambda corpus: ByteTokenizer())
    return tmp_path / "out"


def test_the_figures_are_those_of_the_documents(folder):
    data = read_corpus(folder)
    found = [
        inspect(part, data.tokenizer, frequent=2, first=99, characters=10)
        for part in (data.train, data.validation)
    ]
    assert sum(each.documents for each in found) == len(TEXTS)
    assert sum(each.tokens for each in found) == sum(len(t.encode()) + 1 for t in TEXTS)
    assert sum(each.bytes for each in found) == sum(len(t.encode()) for t in TEXTS)
    assert sum(n for each in found for _, n in each.lengths) == len(TEXTS)
    assert max(each.longest for each in found) == 40
    assert found[0].frequent[0][0] == ord("a")
    assert len(found[0].first) == found[0].documents
    assert found[0].first[-2].endswith("aaaaaaaaaa...")


def test_lengths_are_counted_by_powers_of_two():
    assert histogram(np.array([1, 16, 17, 64, 65, 70])) == [(16, 2), (32, 1), (64, 1), (128, 2)]
    assert histogram(np.zeros(0, np.int64)) == []


def test_the_command_prints_a_table_or_json(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "documents" in output
    assert "'<|endoftext|>'" in output
    assert "document 1: 'a'" in output
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train"]["documents"] + found["validation"]["documents"] == len(TEXTS)


def test_a_run_and_its_cache_can_be_inspected(text_file, tmp_path, capsys):
    from gpt.data.prepare import prepare

    prepare(DataConfig(source=str(text_file)), tmp_path / "run" / "data")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert main(["inspect", str(next((tmp_path / "run" / "data").iterdir()))]) == 0
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "has no prepared tokens; give the folder" in capsys.readouterr().err
