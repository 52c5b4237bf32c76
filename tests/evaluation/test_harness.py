"""The adapter beside the harness's own ``hf`` backend, on the same random model."""

import json

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytest.importorskip("accelerate", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoTokenizer, GPT2LMHeadModel  # noqa: E402

from gpt.config import ModelConfig, UsageError  # noqa: E402
from gpt.data.tokenizer import GPT2Tokenizer  # noqa: E402
from gpt.evaluation.harness import HarnessModel  # noqa: E402
from gpt.interop.export import export_huggingface  # noqa: E402
from tests.conftest import make_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own
TEXTS = ["One two three.", "A  longer text, with spaces ", "naïve 東京", "word " * 60, ""]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    tokenizer = GPT2Tokenizer.released()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=48, n_layer=2, n_head=2, n_embd=32
    )
    ours = make_model(config)
    with torch.no_grad():  # texts that change with the position
        ours.position.weight.mul_(10)
    folder = tmp_path_factory.mktemp("model") / "out"
    export_huggingface(ours, tokenizer, folder)
    theirs = HFLM(
        pretrained=GPT2LMHeadModel.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        batch_size=1,
        max_length=48,
    )
    return HarnessModel(ours, tokenizer, batch_size=3), theirs


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def test_log_likelihoods_are_the_hf_backends(both):
    pairs = [(text, " and so on") for text in TEXTS]
    mine, theirs = (m.loglikelihood(requests("loglikelihood", pairs)) for m in both)
    assert [total for total, _ in mine] == pytest.approx([t for t, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in mine] == [g for _, g in theirs]


def test_rolling_log_likelihoods_are_the_hf_backends(both):
    texts = [(text,) for text in TEXTS[:-1]]
    mine, theirs = (m.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for m in both)
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_generated_texts_are_the_hf_backends(both):
    options = {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False}
    contexts = [(text, dict(options)) for text in TEXTS[:-1]]
    mine, theirs = (m.generate_until(requests("generate_until", contexts)) for m in both)
    assert mine == theirs


OPTIONS = [
    {"max_gen_toks": 12, "until": ["\n", " the"]},
    {"max_new_tokens": 3},
    {"max_new_tokens": 3, "max_gen_toks": 5},
    {"max_tokens": 4},
    {"max_gen_toks": 40, "max_length": 30},
    {"max_gen_toks": 47},
    {"max_gen_toks": 6, "until": "e"},
    {"max_gen_toks": 6, "until": ["", "e"]},
    {"max_gen_toks": 6, "do_sample": False, "temperature": 0.7},
    {"max_gen_toks": 6, "do_sample": True, "temperature": 0.7, "top_k": 1},
    {"max_gen_toks": 6, "temperature": 0.7, "top_p": 1e-9},
    {"max_gen_toks": 6, "temperature": 0.7, "min_p": 1.0},
    {"max_gen_toks": 6, "repetition_penalty": 1.5},
]
REFUSED = [
    {},
    {"max_gen_toks": 48},
    {"max_gen_toks": 0},
    {"max_gen_toks": 6, "max_length": 1},
    {"max_gen_toks": 6, "do_sample": True, "top_k": 1},
    {"max_gen_toks": 6, "no_such_option": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_generation_mean_what_the_hf_backend_means_by_them(options, both):
    contexts = [(text, dict(options)) for text in TEXTS[:-1]]
    if "max_length" in options:
        contexts = contexts[:1]
    mine, theirs = (m.generate_until(requests("generate_until", contexts)) for m in both)
    assert mine == theirs


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_options_that_the_hf_backend_refuses_are_refused(options, both):
    mine, theirs = both
    with pytest.raises(UsageError):
        mine.generate_until(requests("generate_until", [(TEXTS[0], dict(options))]))
    with pytest.raises((AssertionError, ValueError)):
        theirs.generate_until(requests("generate_until", [(TEXTS[0], dict(options))]))


def test_a_task_run_by_the_harness_has_equal_scores(both, tmp_path):
    items = [
        {"question": f"Is {i} even?", "choices": ["yes", "no, it is not"], "answer": i % 2}
        for i in range(12)
    ]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    scores = []
    for model in both:
        result = lm_eval.simple_evaluate(model=model, tasks=[dict(task)], bootstrap_iters=0)
        scores.append(result["results"]["even"])
    assert scores[0]["acc,none"] == scores[1]["acc,none"]
    assert scores[0]["acc_norm,none"] == scores[1]["acc_norm,none"]
    assert torch.is_grad_enabled()
