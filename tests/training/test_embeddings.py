"""Runs that begin with word vectors."""

import dataclasses

import pytest
import torch

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.cli import main
from gpt.config import AdapterConfig, ObjectiveConfig, UsageError
from tests.tiny import change, tiny_run

WORDS = ["--data.tokenizer=char", "--training.freeze", "embed.*", "--model.no_tie_embeddings"]


def words_of(tmp_path, *more):
    shape = ["n_layer=1", "n_head=1", "n_embd=4", "context_length=8"]
    return [
        f"--data.source={tmp_path / 'text.txt'}", f"--run_dir={tmp_path / 'run'}",
        f"--embeddings={tmp_path / 'vectors.txt'}", "--training.batch_tokens=32",
        "--training.micro_batch_size=4", "--evaluation.sample_tokens=0",
        *(f"--model.{word}" for word in shape), *WORDS, *more,
    ]  # fmt: skip


def embedding(tmp_path):
    found = checkpoints.find(tmp_path / "run", "last")
    return tensors.load(found.path / checkpoints.MODEL)["embed.weight"]


def test_a_run_begins_with_word_vectors_and_goes_on_without_them(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc cab bca " * 100)
    (tmp_path / "vectors.txt").write_text("a 1 2 3 4\nb 4 3 2 1\n")
    assert main(["train", *words_of(tmp_path, "--training.max_steps=2")]) == 0
    assert "2 of 5 tokens (40.0%) have a vector" in capsys.readouterr().out
    before = embedding(tmp_path)
    one, two = before[1], before[2]  # a and b, behind the space
    ratio = one / torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    torch.testing.assert_close(two.flip(0), one)
    (tmp_path / "vectors.txt").write_text("a 0 0 0 9\nb 9 0 0 0\n")
    assert main(["train", *words_of(tmp_path, "--training.max_steps=4", "--resume")]) == 0
    assert "have a vector" not in capsys.readouterr().out
    assert torch.equal(embedding(tmp_path), before)


def test_runs_that_keep_no_embeddings_or_need_a_start_model_take_no_vectors(tmp_path):
    config = dataclasses.replace(tiny_run(tmp_path, "x.txt"), init="base")
    with pytest.raises(UsageError, match="adapter.kind lora, whose checkpoints have no embed"):
        dataclasses.replace(config, adapter=AdapterConfig(kind="lora"), embeddings="v.txt")
    dpo = ObjectiveConfig(kind="dpo")
    with pytest.raises(UsageError, match="must be empty with objective.kind dpo"):
        dataclasses.replace(change(config), objective=dpo, embeddings="v.txt")
