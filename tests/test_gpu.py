"""The claims that only a GPU can bear out; the others are about the CPU."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import gpt
from gpt.config import (
    GenerationConfig,
    ModelConfig,
)
from gpt.generation import ahead
from gpt.generation.ahead import capture
from gpt.generation.decode import decode
from gpt.generation.quantisation import Matrix
from gpt.model import head
from gpt.training import float8
from gpt.training.activations import checkpoint_activations
from gpt.training.loss import summed_loss
from gpt.training.run import train
from tests.conftest import make_model
from tests.tiny import tiny_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CONFIG = ModelConfig(vocab_size=61, context_length=64, n_layer=3, n_head=4, n_embd=64)
ON_GPU = {
    "batch_tokens": 1024, "micro_batch_size": 8, "device": "cuda", "precision": "auto",
    "compile": "off",
}  # fmt: skip


@pytest.mark.parametrize("kv_heads", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
@torch.inference_mode()
def test_cached_logits_are_the_full_forwards_on_a_gpu(dtype, tolerance, kv_heads):
    model = make_model(dataclasses.replace(CONFIG, n_kv_head=kv_heads), dtype=dtype).cuda()
    tokens = torch.randint(61, (3, 64), device="cuda")
    full = model(tokens)
    for chunks in ([64], [1] * 64, [40, 1, 1, 7, 15]):
        cache = model.new_cache(3)
        cached = torch.cat([model(c, cache=cache) for c in tokens.split(chunks, 1)], 1)
        assert (cached - full).abs().max() <= tolerance * full.abs().max()


@pytest.mark.parametrize(
    "compile_mode",
    ["off", pytest.param("on", marks=pytest.mark.filterwarnings("ignore"))],  # the compiler's own
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_learns_on_a_gpu_and_resumes(precision, compile_mode, text_file, tmp_path):
    config = tiny_run(
        tmp_path,
        text_file,
        model=vars(CONFIG) | {"vocab_size": 0, "dropout": 0.1},
        training=ON_GPU | {"max_steps": 40, "precision": precision, "compile": compile_mode},
        optimizer={"name": "muon"},
        evaluation={"every": 20, "windows": 4},
        log={"every": 5},
    )
    console = Console(file=io.StringIO())
    assert train(config, console=console).best_loss < 2.5
    longer = dataclasses.replace(config.training, max_steps=50)
    config = dataclasses.replace(config, resume=True, training=longer)
    assert train(config, console=console).step == 50


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < float8.CAPABILITY,
    reason="this GPU does not multiply float8",
)
def test_training_in_float8_learns_on_a_gpu_as_in_bfloat16(text_file, tmp_path):
    losses = {}
    for in_float8 in (False, True):
        config = tiny_run(
            tmp_path / str(in_float8),
            text_file,
            model=vars(CONFIG) | {"vocab_size": 0},
            training=ON_GPU | {"max_steps": 40, "precision": "bfloat16", "float8": in_float8},
            evaluation={"every": 20, "windows": 4},
        )
        losses[in_float8] = train(config, console=Console(file=io.StringIO())).best_loss
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_tokens_are_those_of_plain_decoding(weights, temperature):
    model = gpt.prepare_for_inference(make_model(CONFIG).cuda(), weights)
    config = GenerationConfig(
        temperature=temperature, seed=1, max_new_tokens=40, past_context="stop", bias={3: 1.0}
    )
    prompts = [torch.randint(61, (n,)).tolist() for n in (3, 20, 9)]
    plain = list(decode(model, prompts, config, ahead=1))
    ahead = list(decode(model, prompts, config, ahead=16))
    for number in range(3):
        expected = [token for token in plain if token.sequence == number]
        got = [token for token in ahead if token.sequence == number]
        same = sum(a == b for a, b in zip(expected, got, strict=False))
        assert same == len(expected) if weights == "float32" else same > 5


INTERPRETED = """
import sys
import torch
from gpt import triton_kernels

cases = torch.load(sys.argv[1])
for case in cases:
    case["y"] = triton_kernels.linear(*case["inputs"])
torch.save(cases, sys.argv[1])
"""


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_packed_products_on_a_gpu_have_the_numbers_of_tritons_interpreter(weights, tmp_path):
    triton_kernels = pytest.importorskip("gpt.triton_kernels", reason="needs Triton")
    torch.manual_seed(0)
    cases = []
    for N, K in ((768, 768), (70, 3072), (5, 200), (2, 1)):
        matrix, bias = Matrix(weights, torch.randn(N, K)), torch.randn(N)
        for rows in (1, 3, 32):
            tensors = (matrix.data, matrix.scales, matrix.lows, K, bias)
            x, dense = torch.randn(rows, K), matrix.dense(torch.float32).bfloat16()
            cases += [{"inputs": (x, *tensors), "dense": dense}]
    torch.save(cases, tmp_path / "cases.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, tmp_path / "cases.pt"]
    subprocess.run(command, env=environment, check=True)
    for case in torch.load(tmp_path / "cases.pt"):
        x, *tensors = (i.cuda() if isinstance(i, torch.Tensor) else i for i in case["inputs"])
        y = case["y"].cuda()
        for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
            got = triton_kernels.linear(x.to(dtype), *tensors)
            assert torch.equal(got, triton_kernels.linear(x.to(dtype), *tensors))
            assert (got - y).norm() <= within * y.norm()
        assert torch.equal(triton_kernels.dense(*tensors[:4], torch.bfloat16).cpu(), case["dense"])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_token_in_a_packed_format_makes_no_dense_matrix(weights, monkeypatch):
    triton_kernels = pytest.importorskip("gpt.triton_kernels", reason="needs Triton")
    model = gpt.prepare_for_inference(make_model(CONFIG).cuda(), weights)
    dense, sizes = triton_kernels.dense, []
    monkeypatch.setattr(
        triton_kernels, "dense", lambda data, *rest: sizes.append(len(data)) or dense(data, *rest)
    )
    with torch.inference_mode():
        model(torch.tensor([[1]], device="cuda"), cache=model.new_cache(1))
    assert sizes == [1]  # the embedding's row


def test_the_next_texts_use_the_graphs_of_the_last_ones_on_a_gpu(monkeypatch):
    graphs = []

    def counted(call, device, pool):
        graphs.append(device)
        return capture(call, device, pool)

    monkeypatch.setattr(ahead, "capture", counted)
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # the current one, if it is alone
    model = make_model(dataclasses.replace(CONFIG, n_kv_head=1)).to(device)
    config = GenerationConfig(temperature=0.0, max_new_tokens=40, past_context="stop")
    prompts = [torch.randint(61, (n,)).tolist() for n in (3, 20, 9)]
    first = list(decode(model, prompts, config))
    assert graphs == [device]  # three rows, padded to all that the cache has memory for
    assert list(decode(model, prompts, config)) == first
    assert list(decode(model, prompts, config, ahead=1)) == first
    assert len(graphs) == 1


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), options=None):
        self.names.add(operator.name())
        return operator(*args, **options or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_any_size_gives_the_plain_products_gradients_on_a_gpu(dtype, monkeypatch):
    model = make_model(dataclasses.replace(CONFIG, vocab_size=1001)).to("cuda")
    tokens = torch.randint(1001, (32, 65), device="cuda")
    found = []
    for is_faster in (head._is_faster, lambda weight, x: False):
        monkeypatch.setattr(head, "_is_faster", is_faster)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1])
        found.append((logits.stride(1), logits.detach().clone()))
        summed_loss(logits, tokens[:, 1:]).backward()
        found[-1] += (model.head.weight.grad, model.blocks[0].attn.qkv.weight.grad)
        model.zero_grad(set_to_none=True)
    (wide, *mine), (narrow, *plain) = found
    assert (wide, narrow) == (1024, 1001)
    for one, other in zip(mine, plain, strict=True):
        assert (one - other).norm() / other.norm() < 0.01


@pytest.mark.parametrize("compile_mode", ["off", "on"])
@pytest.mark.parametrize(
    "changes", [{}, {"learned_sinks": True}, {"window": 100, "window_pattern": "LG"}], ids=str
)
def test_flex_attention_gives_the_plain_formulas_gradients_on_a_gpu(
    changes, compile_mode, monkeypatch
):
    shape = {"attention_softcap": 5.0, "position": "rotary", "context_length": 300}
    model = make_model(dataclasses.replace(CONFIG, **shape, **changes)).to("cuda").train()
    tokens = torch.randint(61, (4, 301), device="cuda")
    found = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr("gpt.model.gpt.serves", lambda *arguments, **options: False)
        elif compile_mode == "on":
            for block in model.blocks:
                block.compile()
        views = model.new_shared(tokens[:, :-1], None).views.values()
        assert {view.flex is not None for view in views} == {served}
        summed_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() / other.norm() < 0.01


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_outside_of_training_is_never_cudnns(kv_heads):
    config = dataclasses.replace(CONFIG, n_kv_head=kv_heads)
    model = make_model(config, dtype=torch.bfloat16).cuda()
    tokens = torch.randint(61, (2, 8), device="cuda")
    with torch.no_grad(), Operators() as operators:
        model(tokens)
        cache = model.new_cache(2)
        for token in tokens.split(1, dim=1):
            model(token, cache=cache)
    assert not [name for name in operators.names if "cudnn_attention" in name]


def test_a_run_says_which_attention_it_has_measured_to_be_the_faster(text_file, tmp_path):
    config = tiny_run(
        tmp_path,
        text_file,
        model=vars(CONFIG) | {"vocab_size": 0},
        training=ON_GPU | {"max_steps": 1},
        evaluation={"windows": 1},
    )
    console = Console(file=io.StringIO(), width=200)
    train(config, console=console)
    assert re.search("^attention (cudnn|flash) ", console.file.getvalue(), re.MULTILINE)


def test_a_seed_gives_the_same_text_on_a_gpu(tmp_path):
    from gpt.data.tokenizer import ByteTokenizer

    model = make_model(dataclasses.replace(CONFIG, vocab_size=257)).cuda()
    options = {"num_samples": 3, "max_new_tokens": 100, "seed": 1}
    first = gpt.generate((model, ByteTokenizer()), "x", **options)
    assert first == gpt.generate((model, ByteTokenizer()), "x", **options)
    assert len(set(first)) == 3


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_on_a_gpu_changes_no_gradient_and_keeps_less(kind):
    def gradients(kind):
        model = make_model(dataclasses.replace(CONFIG, dropout=0.1)).cuda().train()
        checkpoint_activations(model, kind)
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            features = model.features(tokens)
        held = torch.cuda.memory_allocated() - before
        features.square().sum().backward()
        return held, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    tokens = torch.randint(61, (16, 64), device="cuda")
    plain_held, plain = gradients("none")
    held, again = gradients(kind)
    assert held < 0.8 * plain_held
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_a_steps_parts_on_a_gpu_add_up_to_less_than_the_step(text_file, tmp_path):
    config = tiny_run(
        tmp_path,
        text_file,
        model=vars(CONFIG) | {"vocab_size": 0},
        training=ON_GPU,
        checkpoint={"every": 5},
        evaluation={"every": 10, "windows": 4},
        log={"every": 4, "profile": 2},
    )
    train(config, console=Console(file=io.StringIO()))
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    record = [json.loads(line) for line in lines if '"loss"' in line][-1]
    parts = [record[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
    assert all(part > 0 for part in parts)
    assert sum(parts) < 1024 / record["tokens_per_second"] * 1.05
    assert "cuda" in (config.run / "trace.json").read_text().lower()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(strategy, precision, text_file, tmp_path):
    def losses(run, *launcher, words=()):
        words = [
            f"--run_dir={tmp_path / run}", f"--data.source={text_file}", "--model.n_layer=2",
            "--training.max_steps=8", f"--training.precision={precision}", "--training.device=cuda",
            "--log.every=1", "--evaluation.every=4", "--training.compile=off", *words,
        ]  # fmt: skip
        script = Path(__file__).parent.parent / "train.py"
        subprocess.run([sys.executable, *launcher, script, *words], check=True)
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [r["loss"] for r in map(json.loads, lines) if "loss" in r]

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = losses("two", *torchrun, words=[f"--parallel.strategy={strategy}"])
    tolerance = 1e-4 if precision == "float32" else 2e-2
    assert two == pytest.approx(losses("one"), rel=tolerance)
