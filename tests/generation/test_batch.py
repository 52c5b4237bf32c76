import json
import random

import pytest
import torch

import gpt
from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation.batch import continue_file
from gpt.generation.text import new_decoder
from tests.conftest import make_model

CONFIG = GenerationConfig(temperature=0, max_new_tokens=12, past_context="stop", stop=("q",))


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=257, context_length=40, n_layer=2, n_head=2, n_embd=32)
    model = make_model(config)
    with torch.no_grad():
        model.position.weight.mul_(10)
    return model, ByteTokenizer()


@pytest.fixture
def prompts(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"id": i, "prompt": "".join(draw.choices("abcdefgh é", k=draw.randint(0, 18)))}
        for i in range(23)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return path


def continued(model, prompts, out, config=CONFIG, batch_size=5, progress=None):
    decoder = new_decoder(model, config, batch_size=batch_size)
    options = {} if progress is None else {"progress": progress}
    return continue_file(model, prompts, out, config, decoder=decoder, **options)


def read(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_every_prompt_has_its_completions_in_order(
    model, prompts, tmp_path, batch_size, num_samples
):
    config = GenerationConfig(seed=1, max_new_tokens=12, num_samples=num_samples)
    told = []
    n = continued(
        model, prompts, tmp_path / "out.jsonl", config, batch_size, lambda *x: told.append(x)
    )
    assert n == 23
    for item, line in zip(read(prompts), read(tmp_path / "out.jsonl"), strict=True):
        alone = gpt.generate(
            model, item["prompt"], seed=1, max_new_tokens=12, num_samples=num_samples
        )
        expected = [{"text": c.text, "reason": c.reason} for c in alone]
        assert line == {**item, "completions": expected}
    assert told[0][:2] == (0, 23)
    assert told[-1][:2] == (23, 23)
    assert 23 * num_samples <= told[-1][2] <= 23 * 12 * num_samples


@pytest.mark.parametrize("seed", range(6))
def test_what_was_killed_goes_on_with_nothing_lost_or_doubled(model, prompts, tmp_path, seed):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    continued(model, prompts, whole)
    content = whole.read_bytes()
    draw = random.Random(seed)
    out.write_bytes(content[: draw.randint(0, len(content))])  # as a kill leaves it
    written = out.read_bytes().count(b"\n")
    assert continued(model, prompts, out) == 23 - written
    assert out.read_bytes() == content
    assert continued(model, prompts, out) == 0
    assert out.read_bytes() == content


class KilledError(Exception):
    pass


def test_what_is_done_is_on_disk_before_the_end(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"

    def kill(done, total, tokens):
        if done == 9:
            raise KilledError

    with pytest.raises(KilledError):
        continued(model, prompts, out, progress=kill)
    assert len(read(out)) >= 9


def test_log_probabilities_are_written_where_they_are_asked_for(model, prompts, tmp_path):
    config = GenerationConfig(temperature=0, max_new_tokens=3, logprobs=2)
    continued(model, prompts, tmp_path / "out.jsonl", config)
    line = read(tmp_path / "out.jsonl")[3]
    [completion] = line["completions"]
    assert len(completion["tokens"]) == len(completion["logprobs"]) == len(completion["top"]) == 3
    assert [pair[1] for pair in completion["top"][0]] == sorted(
        (pair[1] for pair in completion["top"][0]), reverse=True
    )
    assert len(completion["prompt_logprobs"]) == len(line["prompt"].encode()) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no 'prompt'"),
        ('{"prompt": 3}\n', "line 1 has 3 as its 'prompt', which must be a string"),
        ('["a"]\n', "line 1 has no 'prompt'"),
        ("\n", "has no items in it"),
    ],
)
def test_a_broken_file_of_prompts_is_refused_before_anything_is_written(
    model, tmp_path, content, message
):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        continued(model, path, out)
    assert not out.exists()


def test_the_completions_of_other_prompts_are_left_alone(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    for content in ('{"prompt": "other", "completions": []}\n', "a text of mine\n"):
        out.write_text(content)
        with pytest.raises(UsageError, match="line 1 is not of prompt 1"):
            continued(model, prompts, out)
        assert out.read_text() == content
