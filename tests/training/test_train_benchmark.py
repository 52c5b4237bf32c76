"""The program that measures training beside others: its rows train, and mistakes are told."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt import training_kernels
from gpt.config import ModelConfig

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 80, "context_length": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
NANOGPT = """
import torch
class GPTConfig:
    def __init__(self, **fields): self.__dict__ |= fields
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, tokens, targets):
        logits = self.head(tokens)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    path = ROOT / "benchmarks" / "train.py"
    spec = importlib.util.spec_from_file_location("train_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    for name in ("library", "QUERIES"):
        monkeypatch.setattr(training_kernels, name, getattr(training_kernels, name))
    monkeypatch.setattr(module, "SHAPES", {"10m": TINY, "124m": TINY})
    return module


def run(benchmark, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    benchmark.main()


def test_each_row_trains_and_is_in_the_table(benchmark, monkeypatch, tmp_path, capsys):
    """In this process, in the place of one for each row."""
    nanogpt = tmp_path / "model.py"
    nanogpt.write_text(NANOGPT)
    seen = []

    def in_here(words, **options):
        given = dict(zip(words[2::2], words[3::2], strict=True))
        shape = ModelConfig(**TINY, dropout=float(given["--dropout"]))
        seen.append((given["--model"], given["--variant"]))
        rates = benchmark.measure(given["--variant"], shape, 2, 1, given["--nanogpt"])
        return SimpleNamespace(returncode=0, stdout=f"@ {' '.join(map(str, rates))}")

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=in_here))
    monkeypatch.setattr(benchmark, "choose_precision", lambda *_: benchmark.torch.bfloat16)
    monkeypatch.setattr(benchmark, "product_flops", lambda dtype: 1e9)
    words = ["--sequences", "2", "--steps", "1", "--turns", "1", "--nanogpt", str(nanogpt)]
    run(benchmark, monkeypatch, *words)
    assert set(seen) == {
        (model, name)
        for model, ablations in benchmark.ABLATIONS.items()
        for name in ("defaults", *ablations, *benchmark.PEERS)
    }
    said = capsys.readouterr().out
    assert "10m, 32 tokens a step, dropout 0.2" in said
    assert "124m, 32 tokens a step, dropout 0.0" in said
    assert "of nanoGPT" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "defaults,nonsense"], "--only has nonsense; there are defaults"),
        (["--nanogpt", "nothing.py"], "--nanogpt nothing.py is not a file"),
        (["--only", "nanogpt"], "--only has nanoGPT, whose model.py --nanogpt names"),
        (["--dropout", "1"], "--dropout is 1.0, and must be at least 0 and below 1"),
        (["--turns", "0"], "--turns is 0, and must be at least 1"),
        (["--sequences", "17"], "--sequences is 17, and above 16 must be a multiple of 16"),
    ],
)
def test_a_mistake_is_one_sentence(words, said, benchmark, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(benchmark, monkeypatch, *words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_compute_in_the_dtype_of_their_row(dtype, benchmark):
    seen = []

    class Other(torch.nn.Linear):
        def forward(self, tokens, targets):
            out = super().forward(torch.ones(2))
            seen.append(out.dtype)
            return out.sum()

    benchmark.theirs(Other(2, 2), ModelConfig(**TINY), 2, dtype)()
    assert seen == [dtype]
