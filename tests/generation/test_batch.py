import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpt
from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation.batch import continue_file
from gpt.generation.text import new_decoder
from tests.conftest import make_model
from tests.test_cli import RUN

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
    return continue_file(model, prompts, out, decoder, **options)


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
    assert told[0] == (0, 23, 0)
    assert told[-1][:2] == (23, 23)
    assert 23 * num_samples <= told[-1][2] <= 23 * 12 * num_samples


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_continues_and_no_line_is_lost_or_doubled(model, prompts, tmp_path, seed):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    continued(model, prompts, whole)
    content = whole.read_bytes()
    draw = random.Random(seed)
    out.write_bytes(content[: draw.randint(0, len(content))])  # like a killed run
    written = out.read_bytes().count(b"\n")
    assert continued(model, prompts, out) == 23 - written
    assert out.read_bytes() == content
    assert continued(model, prompts, out) == 0
    assert out.read_bytes() == content


class KilledError(Exception):
    pass


def test_finished_lines_are_on_disk_before_the_end(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"

    def kill(done, total, tokens):
        if done == 9:
            raise KilledError

    with pytest.raises(KilledError):
        continued(model, prompts, out, progress=kill)
    assert len(read(out)) >= 9


def test_log_probabilities_are_written_if_the_setting_asks_for_them(model, prompts, tmp_path):
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
        ("\n", "has no items"),
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


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("\\ud800", "line 2 is not JSON: it contains half of a surrogate pair"),
        ("a" * 41, "prompt 2, 'a{40}': the prompt has 41 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named_before_anything_is_written(
    model, tmp_path, prompt, message
):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "%s"}\n' % prompt)  # noqa: UP031
    with pytest.raises(UsageError, match=message):
        continued(model, path, out)
    assert not out.exists()


def test_completions_in_the_file_of_prompts_are_replaced(model, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a", "completions": [1], "id": 7}\n' * 3)
    continued(model, path, out)
    whole = out.read_bytes()
    for size in (len(whole) - 5, len(whole) // 2, 30):
        out.write_bytes(whole[:size])
        continued(model, path, out)
        assert out.read_bytes() == whole
    assert [line["id"] for line in read(out)] == [7, 7, 7]


def test_a_file_with_another_number_of_samples_is_left_alone(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    continued(model, prompts, out)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="line 1 has 1 completions, and num_samples is 2"):
        continued(model, prompts, out, dataclasses.replace(CONFIG, num_samples=2))
    assert out.read_bytes() == before
    with pytest.raises(UsageError, match="is a folder, and must be a file"):
        continued(model, prompts, tmp_path)


def test_two_processes_do_not_write_to_one_file(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"

    def again(done, total, tokens):
        with pytest.raises(UsageError, match=f"another process is writing to {out}"):
            continued(model, prompts, out)

    continued(model, prompts, out, progress=again)
    assert len(read(out)) == 23


def test_a_missing_folder_is_refused(model, prompts, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        continued(model, prompts, tmp_path / "none" / "out.jsonl")


def test_a_process_that_is_killed_loses_nothing(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": "JULIET"[: 1 + i % 6]}) for i in range(64)]
    prompts.write_text("\n".join(lines) + "\n")
    words = [sys.executable, "-m", "gpt.cli", "sample", "--model", str(RUN), "--device", "cpu"]
    words += ["--prompt_file", str(prompts), "--out", str(out), "--seed", "1", "--batch_size", "8"]
    words += ["--max_new_tokens", "60", "--weights", "float32"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not out.exists() or out.stat().st_size < 1500:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed = out.read_bytes()
    assert killed.count(b"\n") < 64
    subprocess.run(words, check=True, capture_output=True)
    assert out.read_bytes().startswith(killed[: killed.rindex(b"\n")])
    assert [line["prompt"] for line in read(out)] == [json.loads(x)["prompt"] for x in lines]


def test_the_completions_of_other_prompts_are_left_alone(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    for content in ('{"prompt": "other", "completions": []}\n', "a text\n", "a text of mine"):
        out.write_text(content)
        with pytest.raises(UsageError, match="does not belong to prompt 1"):
            continued(model, prompts, out)
        assert out.read_text() == content


def test_a_last_line_without_a_line_end_is_kept(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    config = GenerationConfig(max_new_tokens=4)  # without a seed, each run writes other text
    continued(model, prompts, out, config)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    assert continued(model, prompts, out, config) == 0
    assert out.read_bytes() == whole
    first = whole.split(b"\n")[0]
    out.write_bytes(first)
    assert continued(model, prompts, out, config) == 22
    assert out.read_bytes().startswith(first + b"\n")
    for other in (first.replace(b'"prompt": ', b'"prompt": "other", "was": '), b"[" * 100_000):
        out.write_bytes(other)
        with pytest.raises(UsageError, match="made from other prompts"):
            continued(model, prompts, out, config)
        assert out.read_bytes() == other


@pytest.mark.parametrize("kind", ["fifo", "/dev/full", "/dev/null", "/dev/stdout", "link", "nul"])
def test_an_out_that_is_not_a_file_is_refused_before_anything_is_written(
    model, prompts, tmp_path, kind
):
    out = tmp_path / "out.jsonl"
    if kind == "fifo":
        os.mkfifo(out)
    elif kind == "link":
        out.symlink_to("/dev/null")
    elif kind == "nul":
        out = tmp_path / "a\0b"
    else:
        out = Path(kind)
        if kind == "/dev/stdout":
            (tmp_path / "pipe").symlink_to(out)
            read_end, write_end = os.pipe()
            out = Path(f"/dev/fd/{write_end}")
    with pytest.raises(UsageError, match="must be a file|cannot be written: embedded null"):
        continued(model, prompts, out)
    if kind == "/dev/stdout":
        os.close(read_end)
        os.close(write_end)


def test_a_full_disk_leaves_whole_lines_and_ends_in_one_sentence(model, prompts, tmp_path):
    resource = pytest.importorskip("resource")
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    continued(model, prompts, whole)
    content = whole.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        with pytest.raises(UsageError, match=f"{out} cannot be written: File too large"):
            continued(model, prompts, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes().endswith(b"\n")
    assert content.startswith(out.read_bytes())
    continued(model, prompts, out)
    assert out.read_bytes() == content


def test_prompts_have_the_line_ends_of_training(model, tmp_path):
    texts = ("a\r\nb", "a\nb", "\ufeffa\rb")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\r\n" for t in texts))
    continued(model, tmp_path / "p.jsonl", tmp_path / "out.jsonl")
    lines = read(tmp_path / "out.jsonl")
    assert [line["prompt"] for line in lines] == list(texts)
    assert lines[0]["completions"] == lines[1]["completions"] == lines[2]["completions"]
