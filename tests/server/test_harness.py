"""lm-evaluation-harness through the server gives the scores of the adapter."""

import json
import random

import pytest
import torch

import gpt
from gpt import GPT, ModelConfig
from gpt.config import ServeConfig
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.interop.export import export_huggingface
from tests.server.conftest import serving

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval", exc_type=ImportError)
pytest.importorskip("tenacity", reason="needs lm-eval[api]")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away"]


def task_of(folder):
    """A task of 24 questions with three answers each, in a file."""
    chance, lines = random.Random(0), []
    for _ in range(24):
        choices = [" ".join(chance.choices(WORDS, k=3)) for _ in range(3)]
        asked = {"q": " ".join(chance.choices(WORDS, k=8)), "choices": choices}
        lines.append(json.dumps(asked | {"gold": chance.randrange(3)}))
    path = folder / "questions.json"
    path.write_text("\n".join(lines))
    return {
        "task": "questions", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "higher_is_better": True}],
    }  # fmt: skip


def scores_of(task, **options):
    found = lm_eval.simple_evaluate(tasks=[task], bootstrap_iters=0, **options)
    samples = found["samples"]["questions"]
    return torch.tensor([[one[0] for one in each["filtered_resps"]] for each in samples])


def test_local_completions_give_the_scores_of_the_adapter(tmp_path, monkeypatch):
    from gpt.evaluation.harness import HarnessModel

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    tokenizer, folder = GPT2Tokenizer.released(), tmp_path / "model"
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=128, n_layer=2, n_head=2, n_embd=64
    )
    export_huggingface(GPT(config), tokenizer, folder)
    loaded, task = gpt.load(folder), task_of(tmp_path)
    expected = scores_of(task, model=HarnessModel(*loaded))
    with serving(loaded, config=ServeConfig(model="tiny", port=0)) as (address, _):
        about = {
            "model": "tiny", "base_url": f"{address}/v1/completions", "tokenizer": str(folder),
            "tokenizer_backend": "huggingface", "num_concurrent": 2, "max_length": 128,
        }  # fmt: skip
        found = scores_of(task, model="local-completions", model_args=about)
    assert expected.shape == (24, 3)
    assert torch.allclose(found, expected, atol=1e-4)
