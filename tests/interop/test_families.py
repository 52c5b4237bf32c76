"""Every family's table, read forward and backward; and a table from outside with parts of every
kind.
"""

import dataclasses
import json
import typing
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gpt.config import (
    Activation,
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
    UsageError,
)
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation.decode import decode
from gpt.interop.export import export_huggingface
from gpt.interop.families import FAMILIES, Part, family_for, family_of
from gpt.interop.families.family import UNUSED
from gpt.interop.families.fields import ACTIVATION_NAMES, ACTIVATIONS
from gpt.interop.families.gpt2 import GPT2
from gpt.interop.huggingface import bare_name, load_folder
from gpt.interop.weights import exported
from gpt.model import mlp
from gpt.model.gpt import GPT
from gpt.tensors import ALIGNMENT
from gpt.training.build import build_model
from gpt.training.parallel import World
from tests.conftest import hugging_face_greedy, make_model

SHAPE = {"vocab_size": 257, "context_length": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}
ROOT = {
    "vocab_size": 257, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GATED = ROOT | {
    "num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
FIRST = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = GATED | {
    "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6,
    "tie_word_embeddings": True,
}  # fmt: skip
THEIRS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [FIRST, FIRST | {"n_inner": 40, "activation_function": "relu"}],
    "openai-gpt": [FIRST, FIRST | {"afn": "relu"}],
    "gpt_neox": [
        ROOT | {"intermediate_size": 48},
        ROOT | {"intermediate_size": 48, "use_parallel_residual": False, "rotary_pct": 1.0,
                "rotary_emb_base": 500, "tie_word_embeddings": True},
    ],
    "bloom": [{"vocab_size": 257, "hidden_size": 32, "n_head": 4, "n_layer": 2}],
    "llama": [
        GATED,
        GATED | {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}},
        GATED | {"rope_scaling": {"type": "linear", "factor": 2.0}, "attention_bias": True},
        GATED | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "mlp_bias": True},
        GATED | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 16}},
    ],
    "mistral": [GATED | {"sliding_window": 6}, GATED | {"sliding_window": None, "head_dim": 16}],
    "mixtral": [GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}],
    "qwen2": [GATED, GATED | {"use_sliding_window": True, "sliding_window": 5,
                              "max_window_layers": 1}],
    "qwen3": [GATED | {"head_dim": 16}],
    "qwen3_moe": [
        GATED | EXPERTS | {"head_dim": 16, "norm_topk_prob": True, "use_sliding_window": True,
                           "sliding_window": 6},
        GATED | EXPERTS | {"head_dim": 8},
    ],
    "gemma3_text": [
        GEMMA | {"rope_local_base_freq": 500.0},
        GEMMA | {"num_hidden_layers": 3, "final_logit_softcapping": 3.0,
                 "query_pre_attn_scalar": 24,
                 "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                 "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding")]},
    ],
}  # fmt: skip
"""Of each family, configurations with the switches of released models."""
MODELS = [
    pytest.param(name, theirs, id=f"{name} {number}")
    for name, found in THEIRS.items()
    for number, theirs in enumerate(found)
]
TINY = {
    name: [FAMILIES[name].config(theirs, say=str) for theirs in found]
    for name, found in THEIRS.items()
}
TINY["gpt2"] = [
    ModelConfig(**SHAPE),
    ModelConfig(**SHAPE, tie_embeddings=False, n_inner=12, activation="relu"),
    ModelConfig(**SHAPE, bias=False),
]
CASES = [pytest.param(name, config, id=name) for name, found in TINY.items() for config in found]


def test_every_family_has_its_tiny_models():
    assert TINY.keys() == FAMILIES.keys()


def reference(family, theirs):
    """A model of transformers with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **theirs, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1 - FAMILIES[family].added)
    return model.eval()


def with_gradients(model):
    """The same model with its gradients in the place of its weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return model


@pytest.mark.parametrize(("family", "theirs"), MODELS)
def test_a_model_of_transformers_has_the_same_logits_gradients_and_greedy_text(
    family, theirs, tmp_path
):
    known = reference(family, theirs)
    known.save_pretrained(tmp_path / "theirs")
    ours = load_folder(tmp_path / "theirs")
    tokens = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, got = known(tokens, labels=tokens), ours(tokens)
    torch.testing.assert_close(got, expected.logits, rtol=0, atol=1e-4)

    prompt = tokens[:1, :10]
    text = hugging_face_greedy(known, prompt, 50)
    config = GenerationConfig(temperature=0, max_new_tokens=50)
    assert [token.id for token in decode(ours, prompt.tolist(), config)] == text
    static, last, chosen = ours.new_cache(on_device=True), prompt, []
    with torch.inference_mode():
        while len(chosen) < 50:
            last = ours(last, cache=static, last_only=True)[:, -1:].argmax(-1)
            chosen.append(last.item())
    assert chosen == text
    rows = [[], []]
    for token in decode(ours, [prompt[0].tolist(), tokens[1, :3].tolist()], config):
        rows[token.sequence].append(token.id)  # the second one is padded
    assert rows == [text, hugging_face_greedy(known, tokens[1:, :3], 50)]

    loss = torch.nn.functional.cross_entropy(got[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    loss.backward()
    expected.loss.backward()
    with_gradients(known).save_pretrained(tmp_path / "gradients")
    saved = load_file(tmp_path / "gradients" / "model.safetensors")
    table = FAMILIES[family]
    saved = {bare_name(table, name): tensor for name, tensor in saved.items()}
    for name, tensor in exported(with_gradients(ours), table):
        mine = tensor + table.added if name.endswith("norm.weight") else tensor
        scale = float(saved[bare_name(table, name)].detach().abs().max())
        torch.testing.assert_close(
            mine, saved[bare_name(table, name)], rtol=1e-4, atol=1e-5 * scale + 1e-9
        )


@pytest.mark.parametrize(("family", "theirs"), MODELS)
def test_an_exported_model_has_the_same_logits_in_transformers(family, theirs, tmp_path):
    ours = make_model(FAMILIES[family].config(theirs, say=str))
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out", family=family)
    known = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    tokens = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = ours(tokens), known.eval()(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(got.abs().max()))


LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
QWEN2 = {"model_type": "qwen2", "vocab_size": 151_936}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 262_144, "head_dim": 256,
          "query_pre_attn_scalar": 256}  # fmt: skip


def shape(layers, width, heads, kv_heads, inner, **more):
    return {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, **more,
    }  # fmt: skip


def neox(layers, width, heads, vocab):
    return {
        "model_type": "gpt_neox", "num_hidden_layers": layers, "hidden_size": width,
        "num_attention_heads": heads, "intermediate_size": 4 * width, "vocab_size": vocab,
    }  # fmt: skip


RELEASED = {
    "GPT-1": ({"model_type": "openai-gpt"}, 116_534_784),
    "Pythia 70M": (neox(6, 512, 8, 50304), 70_426_624),
    "Pythia 1B": (neox(16, 2048, 8, 50304), 1_011_781_632),
    "Pythia 6.9B": (neox(32, 4096, 32, 50432), 6_857_302_016),
    "BLOOM 560M": ({"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16},
                   559_214_592),
    "BLOOM 7B1": ({"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32},
                  7_069_016_064),
    "Llama 7B": (LLAMA | shape(32, 4096, 32, 32, 11008), 6_738_415_616),
    "Llama 2 70B": (LLAMA | shape(80, 8192, 64, 8, 28672), 68_976_648_192),
    "Llama 3 8B": (LLAMA | shape(32, 4096, 32, 8, 14336, vocab_size=128_256), 8_030_261_248),
    "Llama 3.1 70B": (LLAMA | shape(80, 8192, 64, 8, 28672, vocab_size=128_256), 70_553_706_496),
    "Llama 3.2 1B": (LLAMA | shape(16, 2048, 32, 8, 8192, vocab_size=128_256, head_dim=64,
                                   tie_word_embeddings=True), 1_235_814_400),
    "Mistral 7B": (shape(32, 4096, 32, 8, 14336, model_type="mistral"), 7_241_732_096),
    "Mistral 7B v0.3": (shape(32, 4096, 32, 8, 14336, model_type="mistral", vocab_size=32_768,
                              sliding_window=None), 7_248_023_552),
    "Mixtral 8x7B": (shape(32, 4096, 32, 8, 14336, model_type="mixtral"), 46_702_792_704),
    "Qwen2 0.5B": (QWEN2 | shape(24, 896, 14, 2, 4864, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5 7B": (QWEN2 | shape(28, 3584, 28, 4, 18944, vocab_size=152_064), 7_615_616_512),
    "Qwen3 0.6B": (QWEN3 | shape(28, 1024, 16, 8, 3072, tie_word_embeddings=True), 596_049_920),
    "Qwen3 8B": (QWEN3 | shape(36, 4096, 32, 8, 12288), 8_190_735_360),
    "Qwen3 30B-A3B": (
        QWEN3 | shape(48, 2048, 32, 4, 6144, model_type="qwen3_moe", num_experts=128,
                      num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True),
        30_532_122_624,
    ),
    "Gemma 3 270M": (GEMMA3 | shape(18, 640, 4, 1, 2048, sliding_window=512), 268_098_176),
    "Gemma 3 1B": (GEMMA3 | shape(26, 1152, 4, 1, 6912, sliding_window=512), 999_885_952),
    "Gemma 3 12B": (
        {"model_type": "gemma3", "text_config": shape(48, 3840, 16, 8, 15360, sliding_window=1024,
         rope_scaling={"rope_type": "linear", "factor": 8.0}, vocab_size=262_208, head_dim=256)},
        11_766_034_176,
    ),
    "Gemma 3 27B": (
        {"model_type": "gemma3", "text_config": shape(62, 5376, 32, 16, 21504, sliding_window=1024,
         rope_scaling={"rope_type": "linear", "factor": 8.0}, vocab_size=262_208, head_dim=128,
         query_pre_attn_scalar=168)},
        27_009_346_304,
    ),
    "Gemma 3 4B": (
        {"model_type": "gemma3", "text_config": shape(34, 2560, 8, 4, 10240, sliding_window=1024,
         rope_scaling={"rope_type": "linear", "factor": 8.0}, vocab_size=262_208)},
        3_880_263_168,
    ),
}  # fmt: skip
"""The values of released config.json files, and the published numbers of parameters (of the
larger Gemma 3 those of the text model).
"""


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_has_the_published_number_of_parameters(name):
    theirs, count = RELEASED[name]
    config = family_of(theirs).config(theirs, say=str)
    with torch.device("meta"):
        assert GPT(config).parameter_count() == count


@pytest.mark.parametrize("version", ["older names", "newer names"])
def test_the_text_model_of_gemma_with_images_is_loaded_without_the_rest(version, tmp_path):
    theirs = THEIRS["gemma3_text"][0]
    known = reference("gemma3_text", theirs)
    held = {f"language_model.{name}": t.clone() for name, t in known.state_dict().items()}
    held.pop("language_model.lm_head.weight", None)
    held["vision_tower.encoder.weight"] = torch.zeros(2, 2)
    if version == "newer names":
        held = {
            "model." + name.replace("language_model.model.", "language_model."): tensor
            for name, tensor in held.items()
        }
    save_file(held, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": theirs}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = []
    ours = load_folder(tmp_path, say=said.append)
    tokens = torch.randint(257, (1, 9))
    torch.testing.assert_close(ours(tokens), known(tokens).logits, rtol=0, atol=1e-4)
    assert "only the text model is loaded" in said[0]


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe"])
def test_the_names_that_transformers_has_in_memory_are_loaded_too(family, tmp_path):
    known = reference(family, THEIRS[family][0])
    known.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("lm_head" in name or "gate_up_proj" in name for name in names)
    if family == "mixtral":
        assert not any("block_sparse_moe" in name for name in names)
    tokens = torch.randint(257, (1, 9))
    got = load_folder(tmp_path)(tokens)
    torch.testing.assert_close(got, known(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("field", ["moe_intermediate_size", "num_experts"])
def test_stacked_experts_of_another_size_are_refused(field, tmp_path):
    known = reference("qwen3_moe", THEIRS["qwen3_moe"][0])
    known.save_pretrained(tmp_path, save_original_format=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"num_experts": 4}
    del config["num_local_experts"]
    path.write_text(json.dumps(config | {field: 10**9}))
    with pytest.raises(UsageError, match=rf"{field} and hidden_size give .* have the shape"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "truncate": False}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "hidden_act", "mish"),
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("gpt_neox", "attention_bias", False),
        ("qwen2", "layer_types", ["chunked_attention"] * 2),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("mistral", "quantization_config", {"bits": 4}),
    ],
)
def test_a_setting_that_would_change_the_model_is_refused(family, field, value):
    theirs = THEIRS[family][-1] | {field: value}
    said = {"rope_scaling": "rope_type|truncate"}.get(field, field)
    if family == "qwen2":
        theirs["use_sliding_window"] = True
    with pytest.raises(UsageError, match=said):
        FAMILIES[family].config(theirs, say=str)


def test_a_model_is_exported_to_the_first_family_that_expresses_it():
    found = {
        family: family_for(FAMILIES[family].config(theirs[0], say=str)).model_type
        for family, theirs in THEIRS.items()
    }
    assert found == {family: family for family in THEIRS}
    with pytest.raises(UsageError, match="cannot express model.position sinusoidal"):
        family_for(ModelConfig(position="sinusoidal"))


@pytest.mark.parametrize(("family", "config"), CASES)
def test_an_exported_model_is_loaded_with_equal_logits_to_the_bit(family, config, tmp_path):
    ours = make_model(config)
    with torch.no_grad():  # numbers that survive a subtraction and an addition
        for name, parameter in ours.named_parameters():
            if FAMILIES[family].added and name.endswith("norm.weight"):
                parameter.copy_((parameter * 64).round() / 64)
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
        if not back.get_parameter(name).is_contiguous():  # GPT-2's files have matrices turned
            parameter.data = parameter.data.T.contiguous().T
    tokens = torch.randint(config.vocab_size, (2, 16))
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
    "rotary_scaling": "ntk",
    "position": "none",
    "norm": "rmsnorm",
    "norm_placement": "post",
    "mlp": "gated",
    "moe_score": "sigmoid",
    "moe_balance": "switch",
    "copy": "pointer",
    "initial": "zero",
    "window_pattern": "LG",
    "activation": "silu",
    "rotary_base": 500.0,
    "qkv_bias": "no",
    "norm_bias": "no",
    "mlp_bias": "no",
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
    try:
        changed = dataclasses.replace(config, **{name: other})
    except UsageError:
        return  # there is no such model
    try:
        expressed = table.exported(changed) != table.exported(config)
    except UsageError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "cannot express" in said
        assert f"model.{name} {other}" in said
    else:
        assert expressed or name in UNUSED or table.stored(changed) == table.stored(config)


def test_an_unknown_family_is_refused_and_the_known_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "pieces", Pieces())
    for kind in ("bert", None, ["gpt2"], {}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            UsageError, match="config.json: model_type is .* one of gpt2, .*, pieces"
        ):
            load_folder(tmp_path)


class Pieces(GPT2):
    """GPT-2 with parts of every kind: several of a parameter, turned and not, two parameters in one
    tensor, and norms that are stored with another number.
    """

    name = "Pieces"
    model_type = "pieces"

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


def test_what_need_not_change_stays_in_the_file(pieces):
    path = pieces[1] / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * (-end % ALIGNMENT)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    loaded = load_folder(pieces[1])
    one = loaded.blocks[0]
    first = one.mlp.up.weight.untyped_storage()
    assert not one.mlp.up.weight.is_contiguous()  # turned, as it lies in the file
    assert one.attn_norm.bias.untyped_storage().nbytes() == 16 * 4  # rows of their tensor
    assert first.nbytes() == one.mlp.up.weight.nbytes


def test_the_names_of_activations_are_known_both_ways():
    assert set(ACTIVATION_NAMES) == set(typing.get_args(Activation)) == set(ACTIVATIONS.values())
    assert all(ACTIVATIONS[theirs] == ours for ours, theirs in ACTIVATION_NAMES.items())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_the_function_that_transformers_has_under_its_name(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    torch.testing.assert_close(mlp.ACTIVATIONS[ACTIVATIONS[name]](x), ACT2FN[name](x))


def test_the_activations_of_gpt_1_are_its_own():
    from transformers.models.openai.modeling_openai import ACT_FNS

    names = FAMILIES["openai-gpt"].activations
    assert names.keys() == ACT_FNS.keys()
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    for name, own in names.items():
        torch.testing.assert_close(mlp.ACTIVATIONS[own](x), ACT_FNS[name](x))
    exact = ModelConfig(norm_placement="post", activation="gelu")
    with pytest.raises(UsageError, match="GPT-1 cannot express model.activation gelu$"):
        family_for(exact, "openai-gpt").exported(exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_null_means_what_it_means_to_transformers(family):
    given = {"num_hidden_layers": 40, "num_attention_heads": 32, "hidden_size": 640}
    table = FAMILIES[family]
    for own, setting in table.settings.items():
        theirs = given | {setting.theirs: None}
        try:
            expected = getattr(transformers.AutoConfig.for_model(family, **theirs), setting.theirs)
        except Exception:
            continue  # transformers refuses null there
        found = getattr(table.config(theirs, say=str).resolved(), own)
        if own == "activation":
            expected = table.activations[expected]
        if expected is None:
            expected = {"n_inner": 4 * 640, "head_dim": 20}.get(own, setting.default)
        assert found == expected, own


def test_a_window_that_gemmas_layers_need_cannot_be_null():
    table, layers = FAMILIES["gemma3_text"], THEIRS["gemma3_text"][0]["num_hidden_layers"]
    theirs = THEIRS["gemma3_text"][0] | {"sliding_window": None}
    with pytest.raises(ValueError, match="sliding_window"):
        reference("gemma3_text", theirs)(torch.zeros(1, 4).long(), use_cache=False)
    with pytest.raises(UsageError, match="sliding_window is null, and layers with sliding_attent"):
        table.config(theirs, say=str)
    config = table.config(theirs | {"layer_types": ["full_attention"] * layers}, say=str)
    assert config.layer_pattern() == "G" * layers


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_size": 30}, r"^hidden_size is 30, and .* num_attention_heads \(4\)$"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, and must divide num_att"),
        ("llama", {"rms_norm_eps": "small"}, "^rms_norm_eps is 'small', and must be a number$"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, and must be true or fals"),
        ("llama", {"rope_theta": 0.5}, "^rope_theta is 0.5, and must be above 1$"),
        ("llama", {"hidden_act": "sillu"}, "; did you mean silu.$"),
        ("llama", {"rope_scaling": {"rope_type": "lama3", "factor": 2.0}}, "did you mean llama3"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                              "high_freq_factor": 1.0}},
            r"^low_freq_factor is 4.0, and must be below high_freq_factor \(1.0\)$",
        ),
        ("gpt2", {"n_head": 2.5}, "^n_head is 2.5, and must be a whole number$"),
        ("gpt2", {"n_embd": 32, "hidden_size": 64}, "hidden_size is 64, .* same as n_embd, which"),
        ("gpt2", {f"{part}_pdrop": 2.0 for part in ("attn", "resid", "embd")}, "^resid_pdrop is 2"),
        ("bloom", {"hidden_size": 30, "n_head": 4}, "^hidden_size is 30, .* multiple of n_head"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and num_local_experts"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_fields_as_the_file_has_them(family, changes, said):
    with pytest.raises(UsageError, match=said):
        FAMILIES[family].config(THEIRS[family][0] | changes, say=str)


def test_a_model_whose_router_could_not_learn_runs_and_is_not_trained():
    theirs = THEIRS["mixtral"][0] | {"num_experts_per_tok": 1}
    config = FAMILIES["mixtral"].config(theirs, say=str)
    assert make_model(config)(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()
    with pytest.raises(UsageError, match="its router would not learn"):
        TrainConfig(model=config)
    with pytest.raises(UsageError, match="its router would not learn"):
        build_model(
            make_model(config), TrainingConfig(), ParallelConfig(), World(), "none",
            device=torch.device("cpu"), dtype=torch.float32, say=str,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["lama", "gpt-2"])
def test_a_misspelt_family_has_a_suggestion(name):
    near = {"lama": "llama", "gpt-2": "gpt2"}[name]
    with pytest.raises(UsageError, match=f"did you mean {near}.$"):
        family_of({"model_type": name})
    with pytest.raises(UsageError, match=f"did you mean {near}.$"):
        family_for(ModelConfig(), name)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": None},
        {"sliding_window": None},
        {"sliding_window": 77},
    ],
)
def test_windows_that_a_file_leaves_open_are_those_of_transformers(family, changes):
    given = {"num_hidden_layers": 40, "vocab_size": 99} | changes
    theirs = transformers.AutoConfig.for_model(family, **given)
    config = FAMILIES[family].config({"model_type": family, **given}, say=str)
    window = theirs.sliding_window or 0
    kinds = getattr(theirs, "layer_types", None)
    usual = ["sliding_attention" if window else "full_attention"] * 40
    letters = {"sliding_attention": "L", "full_attention": "G"}
    expected = "".join(letters[kind] for kind in kinds or usual)
    assert config.layer_pattern() == expected
    if "L" in expected:
        assert config.window == window
