"""Every family's table, read forward and backward; and a table from outside with parts of every
kind.
"""

import dataclasses
import json
import typing

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.config import Activation, ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer
from gpt.interop.export import export_huggingface
from gpt.interop.families import FAMILIES, Part
from gpt.interop.families.gpt2 import GPT2
from gpt.interop.huggingface import bare_name, load_folder
from gpt.interop.weights import exported
from gpt.model.gpt import GPT
from tests.conftest import make_model

SHAPE = {"vocab_size": 257, "context_length": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}
TINY = {  # of each family, configurations whose tables differ
    "gpt2": [
        ModelConfig(**SHAPE),
        ModelConfig(**SHAPE, tie_embeddings=False, n_inner=12, activation="relu"),
        ModelConfig(**SHAPE, bias=False),
    ],
}
CASES = [pytest.param(name, config, id=name) for name, found in TINY.items() for config in found]


def test_every_family_has_its_tiny_models():
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("family", "config"), CASES)
def test_an_exported_model_is_loaded_with_equal_logits_to_the_bit(family, config, tmp_path):
    ours = make_model(config)
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out", family=family)
    back = load_folder(tmp_path / "out")
    assert back.config == FAMILIES[family].stored(config)
    own = dict(ours.named_parameters())
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, own.get(name, torch.zeros(parameter.shape))), name
    whole = GPT(back.config).eval()  # a linear layer with a bias of zeros may round otherwise
    whole.load_state_dict(own, strict=False)
    for name, parameter in whole.named_parameters():
        if name not in own:
            parameter.data.zero_()
    tokens = torch.randint(config.vocab_size, (2, config.context_length))
    assert torch.equal(back(tokens), whole(tokens))


@pytest.mark.parametrize(("family", "config"), CASES)
def test_the_parts_of_all_parameters_are_the_tensors_of_the_exported_file(family, config, tmp_path):
    table = FAMILIES[family]
    export_huggingface(make_model(config), ByteTokenizer(), tmp_path / "out", family=family)
    held = load_file(tmp_path / "out" / "model.safetensors")
    stored = table.stored(config)
    with torch.device("meta"):
        parameters = dict(GPT(stored).named_parameters())
    parts = [part for name in parameters for part in table.parts(name, stored)]
    assert all(table.parts(name, stored) for name in parameters)
    assert {part.theirs for part in parts} == held.keys()
    for name, tensor in held.items():
        length = tensor.shape[1 if any(p.turn for p in parts if p.theirs == name) else 0]
        rows = [row for p in parts if p.theirs == name for row in rows_of(p, length)]
        assert sorted(rows) == list(range(length)), name  # each row once


def rows_of(part, length):
    return range(length) if part.rows is None else range(part.rows.start, part.rows.stop)


@pytest.mark.parametrize(("family", "config"), CASES)
def test_the_sizes_of_a_configuration_are_those_of_the_exported_tensors(family, config, tmp_path):
    table = FAMILIES[family]
    shapes = {
        bare_name(table, name): list(tensor.shape)
        for name, tensor in exported(make_model(config), table)
    }
    assert all(shapes[name] == shape for name, _, shape in table.sizes(config))
    layers = {match[1] for name in shapes if (match := table.layer.match(name))}
    assert layers == {str(layer) for layer in range(config.n_layer)}
    assert not [name for name in shapes if table.buffers.fullmatch(name)]


OTHERS = {
    "activation": "silu",
    "rotary_base": 500.0,
    "qkv_bias": "no",
    "norm_bias": "no",
    "dropout": 0.25,
    "norm_eps": 1e-3,
    "n_kv_head": 1,
    "n_head": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig)])
def test_a_family_expresses_each_field_or_refuses_it(family, name):
    table, config = FAMILIES[family], TINY[family][0]
    value = getattr(config, name)
    other = not value if isinstance(value, bool) else OTHERS.get(name, "other")
    other = value + 8 if isinstance(value, int) and other == "other" else other
    changed = dataclasses.replace(config)
    object.__setattr__(changed, name, other)  # also to what no model has yet
    try:
        expressed = table.exported(changed) != table.exported(config)
    except UsageError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert f"cannot express model.{name} {other}" in said
    else:
        assert expressed or table.stored(changed) == table.stored(config)


def test_an_unknown_family_is_refused_and_the_known_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "pieces", Pieces())
    for kind in ("bert", None, ["gpt2"], {}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UsageError, match="config.json: model_type is .* 'gpt2' or 'pieces'"):
            load_folder(tmp_path)


class Pieces(GPT2):
    """GPT-2 with parts of every kind: several of a parameter, turned and not, two parameters in one
    tensor, and norms that are stored with another number.
    """

    name = "Pieces"

    def parts(self, name, config):
        [part] = super().parts(name, config)
        C, place = config.n_embd, part.theirs.rsplit(".", 2)[0]
        match name.split(".")[2:] or name.split("."):
            case ["attn", "qkv", "weight"]:
                return [Part(f"{place}.{kind}.weight", slice(0, C)) for kind in "qkv"]
            case ["attn", "qkv", "bias"]:
                halves = [Part(f"{place}.kq.bias", slice(i * C, (i + 1) * C)) for i in (1, 0)]
                return [*halves, Part(f"{place}.v.bias", slice(0, C))]
            case ["attn", "out", "weight"]:
                half = slice(0, C // 2)
                return [Part(f"{place}.{which}", half, turn=True) for which in ("low", "high")]
            case ["attn_norm" | "mlp_norm" as norm, "bias"]:
                i = ("attn_norm", "mlp_norm").index(norm)
                return [Part(f"{place}.ln_biases", slice(i * C, (i + 1) * C))]
            case [*_, "attn_norm" | "mlp_norm" | "norm", "weight"]:
                return [dataclasses.replace(part, add=1.0)]
        return [part]

    def exported(self, config):
        return super().exported(config) | {"model_type": "pieces"}


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """A model whose norms survive adding and subtracting one, and its folder."""
    monkeypatch.setitem(FAMILIES, "pieces", Pieces())
    ours = make_model(ModelConfig(**SHAPE))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_((parameter * 64).round() / 64)
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out", family="pieces")
    return ours, tmp_path / "out"


@pytest.mark.parametrize("piece", [3, 1 << 20], ids=["small pieces", "large pieces"])
def test_parts_of_every_kind_are_exported_and_loaded(piece, pieces, monkeypatch):
    monkeypatch.setattr("gpt.interop.files.PIECE", piece)
    ours, folder = pieces
    held = load_file(folder / "model.safetensors")
    k = ours.blocks[1].attn.qkv.weight[8:16]
    block = "transformer.h.1"
    assert torch.equal(held[f"{block}.attn.k.weight"], k)
    bias = ours.blocks[1].attn.qkv.bias
    assert torch.equal(held[f"{block}.attn.kq.bias"], torch.cat([bias[8:16], bias[:8]]))
    assert torch.equal(held[f"{block}.attn.high"], ours.blocks[1].attn.out.weight[4:].T)
    biases = [ours.blocks[1].attn_norm.bias, ours.blocks[1].mlp_norm.bias]
    assert torch.equal(held[f"{block}.ln_biases"], torch.cat(biases))
    assert torch.equal(held["transformer.ln_f.weight"], ours.norm.weight - 1)
    back = load_folder(folder)
    for name, parameter in ours.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name


def test_a_number_is_added_before_weights_are_rounded(pieces):
    folder = pieces[1]
    path = folder / "model.safetensors"
    small = torch.full((8,), 2**-7 + 2**-14)  # of which bfloat16 keeps the first summand beside 1
    save_file(load_file(path) | {"transformer.ln_f.weight": small.bfloat16()}, path)
    assert torch.equal(load_folder(folder).norm.weight, 1 + small.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("attn.q.weight", (9, 8), r"has the shape .9, 8., and must have .8, 8."),
        ("attn.high", (4, 8), r"has the shape .4, 8., and must have .8, 4."),
        ("ln_biases", (8,), r"has the shape .8., and must have .16."),
        ("attn.c_attn.bias", (24,), "which Pieces does not have"),
        ("attn.v.bias", None, "lack h.1.attn.v.bias"),
    ],
)
def test_a_part_that_does_not_fit_is_named(name, shape, said, pieces):
    path = pieces[1] / "model.safetensors"
    held = load_file(path)
    if shape is None:
        del held[f"transformer.h.1.{name}"]
    else:
        held[f"transformer.h.1.{name}"] = torch.zeros(shape)
    save_file(held, path)
    with pytest.raises(UsageError, match=said):
        load_folder(pieces[1])


def test_what_need_not_change_stays_in_the_file(pieces, monkeypatch):
    loaded = load_folder(pieces[1])
    one = loaded.blocks[0]
    first = one.mlp.up.weight.untyped_storage()
    assert not one.mlp.up.weight.is_contiguous()  # turned, as it lies in the file
    assert one.attn_norm.bias.untyped_storage().nbytes() == 16 * 4  # rows of their tensor
    assert first.nbytes() == one.mlp.up.weight.nbytes


def test_the_names_of_activations_are_known_both_ways():
    from gpt.interop.families.fields import ACTIVATION_NAMES, ACTIVATIONS

    assert set(ACTIVATION_NAMES) == set(typing.get_args(Activation)) == set(ACTIVATIONS.values())
    assert all(ACTIVATIONS[theirs] == ours for ours, theirs in ACTIVATION_NAMES.items())
