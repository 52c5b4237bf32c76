"""The claims that only a GPU can bear out; the others are about the CPU."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

import gpt
from gpt.config import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from gpt.generation.decode import decode
from gpt.training.loop import train
from tests.conftest import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CONFIG = ModelConfig(vocab_size=61, context_length=64, n_layer=3, n_head=4, n_embd=64)


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


@pytest.mark.parametrize("compile_mode", ["off", "on"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_learns_on_a_gpu_and_resumes(precision, compile_mode, text_file, tmp_path):
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(CONFIG, vocab_size=0, dropout=0.1),
        data=DataConfig(source=str(text_file)),
        training=TrainingConfig(
            max_steps=40,
            batch_tokens=1024,
            micro_batch_size=8,
            device="cuda",
            precision=precision,
            compile=compile_mode,
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=2),
        evaluation=EvaluationConfig(every=20, windows=4),
        log=LogConfig(every=5),
    )
    console = Console(file=io.StringIO())
    assert train(config, console=console).best_loss < 2.5
    longer = dataclasses.replace(config.training, max_steps=50)
    config = dataclasses.replace(config, resume=True, training=longer)
    assert train(config, console=console).step == 50


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_steps_give_the_tokens_of_plain_ones(weights, temperature):
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


def test_a_seed_gives_the_same_text_on_a_gpu(tmp_path):
    from gpt.data.tokenizer import ByteTokenizer

    model = make_model(dataclasses.replace(CONFIG, vocab_size=257)).cuda()
    options = {"num_samples": 3, "max_new_tokens": 100, "seed": 1}
    first = gpt.generate((model, ByteTokenizer()), "x", **options)
    assert first == gpt.generate((model, ByteTokenizer()), "x", **options)
    assert len(set(first)) == 3
