"""GPT-2's weights both ways: the oracle is transformers, on random models in its own files."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gpt
from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from gpt.generation.decode import decode
from gpt.interop.export import export_huggingface
from gpt.interop.families import FAMILIES
from gpt.interop.huggingface import load_folder
from gpt.interop.weights import exported
from gpt.model.gpt import GPT
from gpt.tensors import is_aligned
from tests.conftest import hugging_face_greedy, make_model

SHAPES = {  # the families of GPT-2's sizes and distilgpt2, made small: (layers, heads, width)
    "gpt2": (3, 4, 48),
    "gpt2-medium": (4, 4, 64),
    "gpt2-large": (5, 5, 80),
    "gpt2-xl": (4, 5, 100),
    "distilgpt2": (2, 4, 48),
}
SETTINGS = {
    "plain": {},
    "wide": {"n_inner": 70},
    "unscaled": {"scale_attn_weights": False},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "extended": {"vocab_size": 131},
    **{
        name: {"activation_function": name}
        for name in (
            "gelu",
            "gelu_accurate",
            "gelu_fast",
            "gelu_python",
            "gelu_python_tanh",
            "gelu_pytorch_tanh",
            "relu",
            "silu",
            "swish",
            "tanh",
        )
    },
}


def random_gpt2(seed=0, **settings):
    torch.manual_seed(seed)
    config = {"vocab_size": 97, "n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    config |= {f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")}
    model = GPT2LMHeadModel(GPT2Config(**config | {"eos_token_id": 0, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def tokens_of(model, shape=(2, 20), seed=0):
    return torch.randint(
        model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_gpt2_gives_hugging_faces_logits(settings, tmp_path):
    theirs = random_gpt2(**settings)
    ours = load_folder(saved(theirs, tmp_path))
    tokens = tokens_of(theirs)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_familys_logits_losses_gradients_and_greedy_texts_are_equal(shape, tmp_path):
    layers, heads, width = shape
    theirs = random_gpt2(n_layer=layers, n_head=heads, n_embd=width)
    ours = load_folder(saved(theirs, tmp_path))
    tokens = tokens_of(theirs)
    mine, their = ours(tokens), theirs(tokens, labels=tokens)
    torch.testing.assert_close(mine, their.logits, rtol=0, atol=1e-4)
    loss = F.cross_entropy(mine[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, their.loss, rtol=1e-5, atol=0)
    loss.backward()
    their.loss.backward()
    assert_equal_gradients(ours, theirs)
    prompt = tokens[:1, :10]
    config = GenerationConfig(temperature=0, max_new_tokens=50)
    new = [token.id for token in decode(ours, prompt.tolist(), config)]
    assert new == hugging_face_greedy(theirs, prompt, 50)
    static, last, stepped = ours.new_cache(on_device=True), prompt, []
    with torch.inference_mode():
        while len(stepped) < 50:
            last = ours(last, cache=static, last_only=True)[:, -1:].argmax(-1)
            stepped.append(last.item())
    assert stepped == new


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_loaded_model_may_change_and_its_file_stays_as_it_is(kind, tmp_path):
    theirs = random_gpt2()
    saved(theirs, tmp_path)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = load_folder(tmp_path)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    tokens = tokens_of(theirs)
    torch.testing.assert_close(
        load_folder(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_dtype_are_converted_to_the_one_that_is_asked_for(
    stored, dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr("gpt.interop.files.PIECE", 1_000)
    theirs = random_gpt2()
    saved(theirs.to(stored), tmp_path)
    ours = dict(exported(load_folder(tmp_path, dtype=dtype), FAMILIES["gpt2"]))
    for name, tensor in theirs.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(ours[name], tensor.to(dtype)), name


def test_weights_that_are_not_aligned_in_their_file_are_copied(tmp_path):
    theirs = random_gpt2()
    path = saved(theirs, tmp_path) / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)  # an odd length, as the first writers left it
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    ours = load_folder(tmp_path)
    assert all(is_aligned(parameter) for parameter in ours.parameters())
    tokens = tokens_of(theirs)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_a_head_that_is_not_the_embedding_is_kept_whatever_the_configuration_says(tmp_path):
    theirs = random_gpt2(tie_word_embeddings=False)
    saved(theirs, tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    ours = load_folder(tmp_path)
    expected = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = tokens_of(theirs)
    torch.testing.assert_close(ours(tokens), expected(tokens).logits, rtol=0, atol=1e-4)
    assert not torch.equal(ours.head.weight, ours.embed.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_head_and_an_embedding_in_one_storage_are_one_weight_or_two(new, tied, tmp_path):
    theirs = random_gpt2()
    saved(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=new)
    edit_config(tmp_path, tie_word_embeddings=tied)
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_folder(tmp_path, dtype=dtype)
        assert torch.equal(ours.head.weight, ours.embed.weight)
        with torch.no_grad():
            ours.head.weight.add_(1)
        assert torch.equal(ours.head.weight, ours.embed.weight) == tied
        for name, tensor in theirs.state_dict().items():
            if "wte" not in name and "lm_head" not in name:
                assert torch.equal(
                    dict(exported(ours, FAMILIES["gpt2"]))[name], tensor.to(dtype)
                ), name


def test_a_pickle_whose_tensors_are_views_is_loaded_and_nothing_else_is_touched(tmp_path):
    theirs = random_gpt2()
    with torch.no_grad():
        theirs.transformer.wte.weight.zero_()
    saved(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    state["transformer.wte.weight"] = torch.zeros(1, 1).expand(97, 32)
    torch.save(state, tmp_path / "pytorch_model.bin")
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_folder(tmp_path, dtype=dtype)
        assert not ours.embed.weight.any()
        assert torch.equal(ours.position.weight, theirs.transformer.wpe.weight.to(dtype))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(97, 32, dtype=torch.int8), "wte.weight in .* is int8 strided"),
        (torch.zeros(97, 32).to_sparse(), "wte.weight in .* is float32 sparse_coo"),
    ],
    ids=["int8", "sparse"],
)
def test_weights_that_are_no_numbers_are_refused(tensor, said, tmp_path):
    saved(random_gpt2(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {k: v for k, v in random_gpt2().state_dict().items() if k != "lm_head.weight"}
    torch.save(state | {"transformer.wte.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=said):
        load_folder(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    theirs = random_gpt2()
    path = saved(theirs, tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"wte.weight": torch.zeros(97, 32)}, path)
    with pytest.raises(UsageError, match="have wte.weight twice, under two names"):
        load_folder(tmp_path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def test_the_other_names_that_gpt2config_takes_mean_the_same(tmp_path):
    theirs = random_gpt2()
    saved(theirs, tmp_path)
    edit_config(
        tmp_path,
        n_head="absent", num_attention_heads=4, n_embd="absent", hidden_size=32,
        n_layer="absent", num_hidden_layers=2, n_positions="absent", max_position_embeddings=64,
    )  # fmt: skip
    tokens = tokens_of(theirs)
    torch.testing.assert_close(
        load_folder(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": "2"}, "n_layer is '2', and must be a whole number"),
        ({"vocab_size": 97.0}, "vocab_size is 97.0"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"scale_attn_weights": "false"}, "scale_attn_weights is 'false'"),
        ({"activation_function": ["gelu"]}, "activation_function is .'gelu'."),
        (
            {"num_attention_heads": 8},
            "num_attention_heads is 8, and must be the same as n_head, which",
        ),
        ({"quantization_config": {"a": 1}}, "quantization_config is given"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_named(changes, said, tmp_path):
    saved(random_gpt2(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UsageError, match=said):
        load_folder(tmp_path)


def test_without_a_dtype_the_stored_one_is_taken(tmp_path):
    saved(random_gpt2().to(torch.bfloat16), tmp_path)
    assert load_folder(tmp_path, dtype=None).embed.weight.dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_loading_is_at_most_1_2_times_the_weights(dtype, tmp_path):
    config = ModelConfig(vocab_size=60_000, context_length=64, n_layer=6, n_head=8, n_embd=512)
    model = make_model(config)
    export_huggingface(model, ByteTokenizer(), tmp_path / "model")
    program = f"""
import torch
from pathlib import Path
from gpt.interop.huggingface import load_folder
def read(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
load_folder(Path({str(tmp_path / "model")!r}), dtype=torch.float16)  # what is imported late
before = read("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
model = load_folder(Path({str(tmp_path / "model")!r}), dtype=torch.{dtype})
float(sum(p.sum() for p in model.parameters()))
print(read("VmHWM:") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    weights = model.parameter_count() * getattr(torch, dtype).itemsize
    assert weights * 0.8 < int(done.stdout) < weights * 1.2


@pytest.mark.slow
def test_at_full_size_logits_losses_gradients_and_greedy_texts_are_equal(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    ours = load_folder(saved(theirs, tmp_path))
    tokens = torch.randint(50257, (1, 200))
    mine, their = ours(tokens), theirs(tokens, labels=tokens)
    torch.testing.assert_close(mine, their.logits, rtol=0, atol=1e-4)
    loss = F.cross_entropy(mine[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, their.loss, rtol=1e-5, atol=0)
    loss.backward()
    their.loss.backward()
    assert_equal_gradients(ours, theirs)
    prompt = tokens[:, :50]
    mask = torch.ones_like(prompt)
    generated = theirs.generate(
        prompt, attention_mask=mask, max_new_tokens=50, min_new_tokens=50, do_sample=False
    )
    config = GenerationConfig(temperature=0, max_new_tokens=50, ban=(50256,))
    new = [token.id for token in decode(ours, prompt.tolist(), config)]
    assert new == generated[0, 50:].tolist()


def assert_equal_gradients(ours, theirs):
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        [part] = FAMILIES["gpt2"].parts(name, ours.config)
        their = gradients[part.theirs]
        mine = parameter.grad.T if part.turn else parameter.grad
        torch.testing.assert_close(
            mine, their, rtol=1e-3, atol=1e-5 * float(their.abs().max()) + 1e-7
        )


def bare_names(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def with_buffers(state):
    mask = torch.ones(64, 64).tril()[None, None]
    return state | {
        "transformer.h.0.attn.bias": mask,
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }


@pytest.mark.parametrize("change", [bare_names, with_buffers, dict], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin sharded", "safetensors sharded"])
def test_every_kind_of_file_holds_the_same_model(kind, change, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.interop.files.PIECE", 1_000)  # so that a table is cut
    theirs = random_gpt2()
    saved(theirs, tmp_path)
    state = {k: v.clone() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    state = change(state)
    (tmp_path / "model.safetensors").unlink()
    suffix = "safetensors" if "safetensors" in kind else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    write = save_file if suffix == "safetensors" else torch.save
    if "sharded" in kind:
        names = sorted(state)
        places = {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-{i:05}-of-00002.{suffix}"
            write({name: state[name] for name in part}, tmp_path / file)
            places |= dict.fromkeys(part, file)
        index = tmp_path / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        write(state, tmp_path / f"{stem}.{suffix}")
    tokens = tokens_of(theirs)
    torch.testing.assert_close(
        load_folder(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


def test_weights_are_loaded_in_the_dtype_that_is_asked_for_and_need_no_file_after(tmp_path):
    theirs = random_gpt2()
    ours = load_folder(saved(theirs, tmp_path), dtype=torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    weight = theirs.transformer.h[0].mlp.c_fc.weight.T.bfloat16()
    assert torch.equal(ours.blocks[0].mlp.up.weight, weight)
    assert all(p.is_contiguous() and p.dtype == torch.bfloat16 for p in ours.parameters())
    assert ours.head.weight is ours.embed.weight


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def spoil(folder, how):
    weights = folder / "model.safetensors"
    config = folder / "config.json"
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "wrong shape":
            edit(folder, lambda s: s.update({"transformer.h.1.mlp.c_fc.weight": torch.ones(32, 9)}))
        case "missing tensor":
            edit(folder, lambda s: s.pop("transformer.h.1.ln_2.bias"))
        case "unknown tensor":
            edit(folder, lambda s: s.update({"transformer.h.1.extra": torch.ones(1)}))
        case "no weights":
            weights.unlink()
        case "malicious pickle":
            weights.unlink()
            payload = {"transformer.wte.weight": Payload(folder / "executed")}
            torch.save(payload, folder / "pytorch_model.bin")
        case "no tensors":
            weights.unlink()
            torch.save({"a": 1}, folder / "pytorch_model.bin")
        case "broken pickle":
            weights.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"no pickle")
        case "index outside":
            weights.rename(folder.parent / "outside.safetensors")
            index = {"weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "broken config":
            config.write_text("{")
        case _:
            field, value = how.split("=")
            content = json.loads(config.read_text()) | {field: json.loads(value)}
            config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "model.safetensors cannot be read"),
        ("wrong shape", "h.1.mlp.c_fc.weight in .* has the shape .32, 9., and .* .32, 128."),
        ("missing tensor", "lack h.1.ln_2.bias"),
        ("unknown tensor", "have transformer.h.1.extra, which GPT-2 does not have"),
        ("no weights", "has no weights"),
        ("malicious pickle", "pytorch_model.bin is refused: .* could run code"),
        ("no tensors", "not a dictionary of tensors"),
        ("broken pickle", "pytorch_model.bin (cannot be read|is refused)"),
        ("index outside", "names '../outside.safetensors', which is not in its folder"),
        ("broken config", "config.json is not JSON"),
        ('model_type="bert"', "model_type is 'bert', and must be one of gpt2, "),
        (
            'activation_function="mish"',
            "activation_function is 'mish', and must be one",
        ),
        ("add_cross_attention=true", "add_cross_attention is true"),
        ("resid_pdrop=1.5", "resid_pdrop is 1.5, and must be"),
        ("n_head=5", "n_embd is 32, and must be a multiple of n_head"),
    ],
)
def test_what_is_broken_or_not_supported_is_told_and_nothing_is_loaded(how, said, tmp_path):
    folder = saved(random_gpt2(), tmp_path / "model")
    spoil(folder, how)
    with pytest.raises(UsageError, match=said) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "executed").exists()


EXPORTS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "settings": {"n_inner": 50, "activation": "relu", "scale_attention_by_layer": True},
    "unscaled": {"scale_attention": False, "norm_eps": 1e-4, "dropout": 0.25},
}
OTHER_NAMES = {  # of the same model, except that GPT-2's missing biases are zeros
    "norm_bias": {"norm_bias": "yes"},
    "qkv_bias": {"qkv_bias": "yes"},
    "window_pattern": {"window_pattern": "GGG"},
    "sizes": {"n_kv_head": 4, "head_dim": 8, "rotary_base_local": 10_000.0},
    "norms alone": {"bias": False, "norm_bias": "yes"},
    "not in queries": {"qkv_bias": "no"},
}


@torch.no_grad()
@pytest.mark.parametrize("settings", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_what_resolves_to_a_gpt2_is_exported_as_one(settings, tmp_path):
    config = ModelConfig(vocab_size=257, context_length=32, n_layer=2, n_head=4, n_embd=32)
    ours = make_model(dataclasses.replace(config, **settings))
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out")
    back = load_folder(tmp_path / "out")
    assert back.config == config
    tokens = torch.randint(257, (2, 20))
    torch.testing.assert_close(back(tokens), ours(tokens))


def test_a_parameter_that_is_not_trained_stays_so_in_a_loaded_model(tmp_path, monkeypatch):
    def frozen(config):
        model = GPT(config)
        model.norm.requires_grad_(False)
        return model

    monkeypatch.setattr("gpt.interop.huggingface.GPT", frozen)
    model = load_folder(saved(random_gpt2(), tmp_path / "in"))
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("settings", EXPORTS.values(), ids=EXPORTS)
def test_an_exported_model_has_the_same_logits_in_transformers_and_comes_back_to_the_bit(
    settings, tmp_path
):
    config = ModelConfig(vocab_size=257, context_length=32, n_layer=2, n_head=4, n_embd=32)
    ours = make_model(dataclasses.replace(config, **settings))
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out")
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(257, (2, 20))
    mine = ours(tokens)
    torch.testing.assert_close(
        mine, theirs.eval()(tokens).logits, rtol=0, atol=1e-5 * mine.abs().max().item()
    )
    back = load_folder(tmp_path / "out")
    assert back.config == ours.config
    for name, parameter in ours.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter)


def test_a_model_from_transformers_goes_back_to_the_bit(tmp_path):
    theirs = random_gpt2(vocab_size=257, eos_token_id=256)
    ours = load_folder(saved(theirs, tmp_path / "in"))
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out")
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_an_exported_tokenizer_gives_the_same_ids_in_transformers_and_comes_back(kind, tmp_path):
    text = "ROMEO: naïve 東京 \U0001f600\n\n  don't <|endoftext|> 123  \n"
    tokenizer = {
        "char": lambda: CharTokenizer(text),
        "byte": ByteTokenizer,
        "gpt2": GPT2Tokenizer.released,
    }[kind]()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=8, n_layer=1, n_head=1, n_embd=4
    )
    export_huggingface(make_model(config), tokenizer, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = text.replace("<|endoftext|>", "<endoftext>")
    ids = theirs(plain)["input_ids"]
    assert ids == tokenizer.encode(plain).tolist()
    assert theirs.decode(ids) == plain
    assert theirs.eos_token_id == tokenizer.end_of_text
    strict = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    strict.encode_special_tokens = True  # what looks like a special token in a text is text
    ids = strict.encode(text).ids
    assert ids == tokenizer.encode(text).tolist()
    _, back = gpt.load(tmp_path / "out")
    assert back.encode(text).tolist() == ids
    assert back.end_of_text == tokenizer.end_of_text


def test_what_gpt2_cannot_express_is_refused_by_its_fields(tmp_path):
    config = ModelConfig(
        vocab_size=257, context_length=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=4, bias=False
    )
    with pytest.raises(UsageError, match="cannot express model.n_kv_head 1"):
        export_huggingface(make_model(config), ByteTokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_has_what_other_converters_read(tmp_path):
    config = ModelConfig(vocab_size=257, context_length=16, n_layer=1, n_head=1, n_embd=16)
    export_huggingface(make_model(config), ByteTokenizer(), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["n_ctx"] == settings["n_positions"] == 16  # llama.cpp's knows the old name
    tokens = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokens["unk_token"] == tokens["eos_token"]  # CTranslate2's wants one


def test_an_export_does_not_write_over_anything(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out exists"):
        export_huggingface(tiny_model, ByteTokenizer(), tmp_path / "out")
