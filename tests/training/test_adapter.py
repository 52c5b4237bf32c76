import dataclasses
import hashlib
import io
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gpt import checkpoint as checkpoints
from gpt.cli import main
from gpt.config import AdapterConfig, ModelConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.generation.frozen import freeze_rounded, round_weights
from gpt.interop.adapters import add_adapter
from gpt.interop.load import load
from gpt.model.adapter import adapt, adapter_weights, was_trained_over
from gpt.model.surgery import conform, crop_context
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


@pytest.fixture(scope="module")
def rotary_base(tmp_path_factory, base):
    """A model with rotary positions, whose context can be lengthened."""
    config = dataclasses.replace(base, run_dir=str(tmp_path_factory.mktemp("rotary") / "run"))
    config = change(config, model={"position": "rotary"})
    run(config)
    return config


LONGER = {
    "position": "rotary",
    "context_length": 32,
    "rotary_scaling": "linear",
    "rotary_scaling_factor": 2.0,
}


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "over int4"])
@pytest.mark.parametrize("model", [LONGER, {"context_length": 8, "vocab_size": 60}], ids=str)
def test_an_adapter_loads_with_the_context_and_positions_of_its_run(
    kind, model, rotary_base, tmp_path
):
    training = {"batch_tokens": 64, "micro_batch_size": 2}
    config = adapted(rotary_base, tmp_path, kind, training=training)
    run(dataclasses.replace(config, model=ModelConfig(**{"vocab_size": 0} | model)))
    for loaded in (load(config.run_dir), load(rotary_base.run_dir, adapter=config.run_dir)):
        own = loaded.model.config
        assert all(getattr(own, name) == value for name, value in model.items())
        _, trained = last(config)
        plain = load(rotary_base.run_dir, trainable=True).model
        conform(plain, own)
        if kind == "over int4":
            round_weights(plain, "int4")
        adapt(plain, config.adapter, trained)
        tokens = torch.arange(own.context_length)[None] % 10
        assert (loaded.model(tokens) - plain.eval()(tokens)).abs().max() < 1e-5


def test_peft_gets_no_adapter_over_other_positions(rotary_base, tmp_path, capsys):
    training = {"batch_tokens": 64, "micro_batch_size": 2}
    config = adapted(rotary_base, tmp_path, "lora", training=training)
    run(dataclasses.replace(config, model=ModelConfig(vocab_size=0, **LONGER)))
    words = ["--adapter", config.run_dir, "--to", "peft"]
    assert main(["export", rotary_base.run_dir, str(tmp_path / "x"), *words]) == 2
    assert "trained with model.rotary_scaling linear" in capsys.readouterr().err


def test_an_adapter_keeps_the_tokenizer_of_its_run(base, tmp_path):
    config = adapted(base, tmp_path, "lora")
    run(config)
    path = config.run / "tokenizer.json"
    said = json.loads(path.read_text())
    assert load(config.run_dir).tokenizer.chat is None
    path.write_text(
        json.dumps(said | {"chat": {"templates": {"default": "{{ messages }}"}, "tokens": {}}})
    )
    own = tokenizers.load(path).chat
    assert own is not None
    assert load(config.run_dir).tokenizer.chat == own
    assert load(base.run_dir, adapter=config.run_dir).tokenizer.chat == own


@pytest.mark.parametrize("name", ["embed.weight", "norm.weight", "blocks.0.mlp.up.weight"])
def test_an_adapter_is_refused_over_a_model_with_one_other_weight(name, base, tmp_path):
    config = adapted(base, tmp_path, "lora")
    run(config)
    model = load(base.run_dir, trainable=True).model
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    with pytest.raises(UsageError, match="this model has other weights"):
        add_adapter(model, config.run)


def hash_of_blocks(model):
    """The fingerprint that older versions recorded."""
    digest = hashlib.sha256()
    for name, parameter in model.blocks.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().float().contiguous().numpy().data)
    return digest.hexdigest()


def test_an_adapter_of_an_older_version_knows_the_blocks_of_its_base(base):
    model = load(base.run_dir, trainable=True).model
    recorded = hash_of_blocks(model)
    assert was_trained_over(model, recorded)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(1.01)
    assert not was_trained_over(model, recorded)


def test_a_model_with_too_few_positions_is_another_one(base, tmp_path):
    config = adapted(base, tmp_path, "lora")
    run(config)
    model = load(base.run_dir, trainable=True).model
    crop_context(model, 8)
    with pytest.raises(UsageError, match="this model has other weights"):
        add_adapter(model, config.run)


def test_peft_gets_an_adapter_that_was_trained_in_a_shorter_context(base, tmp_path):
    config = adapted(base, tmp_path, "lora", training={"batch_tokens": 64, "micro_batch_size": 2})
    run(dataclasses.replace(config, model=ModelConfig(vocab_size=0, context_length=8)))
    out = tmp_path / "peft"
    words = ["--adapter", config.run_dir, "--to", "peft"]
    assert main(["export", base.run_dir, str(out), *words]) == 0
    tokens = torch.arange(8)[None]
    logits = load(base.run_dir, adapter=out).model(tokens)
    assert (logits - load(config.run_dir).model(tokens)).abs().max() < 1e-5


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


PARTS = {
    "freeze": {"freeze": ("embed.*", "blocks.0.*")},
    "rates": {"rates": ("embed.*=0.1", "blocks.*=2")},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_learns_weights_unequally_resumes_bit_for_bit(part, base, tmp_path):
    group = "training" if part == "freeze" else "optimizer"
    ended = []
    for name in ("whole", "stopped"):
        config = dataclasses.replace(base, init=base.run_dir, run_dir=str(tmp_path / name))
        config = change(config, training={"max_steps": 6}, evaluation={"every": 3})
        config = change(config, **{group: PARTS[part]})
        run(config)
        if name == "stopped":
            (config.run / "checkpoints" / "step-00000006" / "meta.json").unlink()
            run(dataclasses.replace(config, resume=True))
        ended.append(last(config)[1])
    whole, stopped = ended
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


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
