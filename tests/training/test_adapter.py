import dataclasses
import io
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gpt import checkpoint as checkpoints
from gpt.cli import main
from gpt.config import AdapterConfig, UsageError
from gpt.generation.frozen import freeze_rounded
from gpt.interop.adapters import add_adapter
from gpt.interop.load import load
from gpt.model.adapter import adapter_weights
from gpt.training.run import train
from tests.tiny import change, tiny_run

KINDS = {
    "lora": {"kind": "lora", "rank": 2, "dropout": 0.1},
    "bottleneck": {"kind": "bottleneck", "rank": 4},
    "over int4": {"kind": "lora", "rank": 2, "targets": ("attn.*", "mlp.*"), "base": "int4"},
}


def run(config):
    console = Console(file=io.StringIO(), width=200)
    initial = partial(load, trainable=True)
    return train(config, console=console, initial=initial, freeze_rounded=freeze_rounded)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog ran in the fog.\n" * 60)
    config = tiny_run(
        folder,
        folder / "text.txt",
        training={"max_steps": 2},
        evaluation={"every": 2, "sample_tokens": 0},
    )
    run(config)
    return config


def adapted(base, folder, kind, **groups):
    config = dataclasses.replace(base, init=base.run_dir, run_dir=str(folder / "adapter"))
    training = {"max_steps": 6} | groups.pop("training", {})
    config = change(config, training=training, evaluation={"every": 3}, **groups)
    return dataclasses.replace(config, adapter=AdapterConfig(**KINDS[kind]))


def last(config):
    found = checkpoints.find(config.run, "last")
    return found, load_file(found.path / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_adapter_is_the_uninterrupted_one_bit_for_bit(kind, base, tmp_path):
    whole = adapted(base, tmp_path / "whole", kind)
    run(whole)
    weights = last(whole)[1]
    assert {name.rpartition(".")[2] for name in weights} == {"adapter_a", "adapter_b"}
    assert sum(t.nbytes for t in weights.values()) < 40_000
    assert weights["blocks.0.attn.out.adapter_b"].abs().max() > 0

    stopped = adapted(base, tmp_path / "stopped", kind)
    run(stopped)
    for path in (stopped.run / "checkpoints").glob("step-00000006"):
        (path / "meta.json").unlink()  # as if it had been killed while it wrote the last one
    run(dataclasses.replace(stopped, resume=True))
    again = last(stopped)[1]
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_an_adapter_loads_with_its_base(kind, base, tmp_path):
    config = adapted(base, tmp_path, kind)
    run(config)
    tokens = torch.arange(16)[None] % 10
    alone, over = load(config.run_dir).model, load(base.run_dir, adapter=config.run_dir).model
    model = load(base.run_dir, trainable=True).model
    plain = model(tokens)
    add_adapter(model, config.run)
    logits = model.eval()(tokens)
    assert (logits - plain).abs().max() > 1e-4
    for loaded in (alone, over, load(config.run_dir, weights="float32").model):
        assert (loaded(tokens) - logits).abs().max() < 1e-5
    if kind == "bottleneck":
        assert adapter_weights(alone)
        with pytest.raises(UsageError, match="bottleneck, which runs with float weights"):
            load(config.run_dir, weights="int8")
    else:
        assert not adapter_weights(alone)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    config = adapted(base, tmp_path, "lora")
    run(config)
    other = dataclasses.replace(base, run_dir=str(tmp_path / "other"))
    run(change(other, training={"seed": 5}))
    with pytest.raises(UsageError, match="this model has other weights"):
        load(other.run_dir, adapter=config.run_dir)
    moved = dataclasses.replace(config, init=other.run_dir, resume=True)
    with pytest.raises(UsageError, match="init"):
        run(moved)
    with pytest.raises(UsageError, match="must be the folder of a run with an adapter"):
        load(base.run_dir, adapter=base.run_dir)


def test_an_adapter_needs_a_model_to_adapt(base):
    with pytest.raises(UsageError, match="adapter.kind is lora, and needs the model to adapt"):
        dataclasses.replace(base, adapter=AdapterConfig(kind="lora"))


def test_frozen_weights_stay_as_they_were(base, tmp_path):
    config = dataclasses.replace(base, init=base.run_dir, run_dir=str(tmp_path / "frozen"))
    run(change(config, training={"freeze": ("embed.*", "blocks.0.*")}))
    before, after = last(base)[1], last(config)[1]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("embed.", "blocks.0."))}


def test_the_commands_take_an_adapter(base, tmp_path, capsys):
    config = adapted(base, tmp_path, "lora")
    run(config)
    over = ("--adapter", config.run_dir)
    out = tmp_path / "peft"
    assert main(["export", base.run_dir, str(out), *over, "--to", "peft"]) == 0
    tokens = torch.arange(16)[None] % 10
    logits = load(base.run_dir, adapter=out).model(tokens)
    assert (logits - load(config.run_dir).model(tokens)).abs().max() < 1e-5
    words = ("--prompt", "the", "--max_new_tokens", "3", "--device", "cpu")
    assert main(["sample", "--model", base.run_dir, *over, *words]) == 0
    text = str(base.data.source)
    words = ("--text", text, "--weights", "float32", "--device", "cpu", "--json")
    assert main(["evaluate", base.run_dir, *over, *words]) == 0
    assert main(["evaluate", config.run_dir, *words]) == 0
    assert main(["export", base.run_dir, str(tmp_path / "x"), "--to", "peft"]) == 2
    assert "to is peft" in capsys.readouterr().err
