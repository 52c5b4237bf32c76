"""The command line as a person meets it."""

import dataclasses
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt import checkpoint as checkpoints
from gpt import cli
from gpt.cli import main
from gpt.config import SampleConfig, TrainConfig, UsageError

ROOT = Path(__file__).parent.parent
RUN = ROOT / "tests" / "checkpoints" / "format-1"
TINY = [
    "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.context_length=16",
    "--training.batch_tokens=128", "--training.micro_batch_size=8", "--training.device=cpu",
    "--evaluation.windows=4", "--evaluation.sample_tokens=20", "--log.every=1",
]  # fmt: skip


def sampled(capsys, *words):
    status = main(["sample", "--model", str(RUN), "--device", "cpu", *words], prog="sample.py")
    return status, capsys.readouterr()


def train_words(text_file, tmp_path, *words):
    return [
        "train", str(ROOT / "configs" / "shakespeare.toml"), *TINY, "--data.source", str(text_file),
        "--run_dir", str(tmp_path / "run"), *words,
    ]  # fmt: skip


def test_train_then_sample_end_to_end(text_file, tmp_path, capsys):
    words = train_words(text_file, tmp_path, "--training.max_steps", "3")
    assert main(words, prog="train.py") == 0
    output = capsys.readouterr().out
    assert "step 3: validation" in output
    words = ["sample", "--model", str(tmp_path / "run"), "--prompt", "ALL:", "--seed", "1"]
    assert main([*words, "--max_new_tokens", "30"], prog="sample.py") == 0
    assert capsys.readouterr().out.startswith("ALL:")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_names_every_field_with_its_default_and_a_line(script):
    run = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    )
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run.stdout).split())
    for name in field_names(TrainConfig if script == "train.py" else SampleConfig):
        shown = re.search(rf"--{re.escape(name)}\b(?:, --\S+)?(.*?)(?= --|$)", words)
        assert shown, name
        assert "(default: " in shown[1], name
        assert len(shown[1].split("(default")[0]) > 15, name


def field_names(schema, group=""):
    for field in dataclasses.fields(schema):
        kind = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(kind):
            yield from field_names(type(kind), f"{field.name}.")
        else:
            yield group + field.name


def test_the_commands_are_listed(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in output


def test_the_default_configuration_is_found_from_any_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model.n_head", "5"]) == 2  # refused before anything starts
    assert "model.n_embd is 192" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_text(capsys):
    words = ["--prompt", "ROMEO:", "--max_new_tokens", "40", "--seed", "3"]
    assert sampled(capsys, *words) == sampled(capsys, *words)
    assert sampled(capsys, *words)[1].out != sampled(capsys, *words, "--seed", "4")[1].out


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_the_weights_have_the_format_that_is_asked_for(weights, capsys, monkeypatch):
    from gpt.interop import load as loading

    prepared, prepare = [], loading.prepare_for_inference

    def record(model, kind):
        prepared.append(prepare(model, kind))
        return prepared[-1]

    monkeypatch.setattr(loading, "prepare_for_inference", record)
    words = ("--prompt", "ROMEO:", "--max_new_tokens", "3", "--weights", weights)
    _, output = sampled(capsys, *words)
    assert {model.head.matrix.kind for model in prepared} == {weights}
    assert f"weights in {weights}, on cpu" in output.err


def test_samples_are_shown_with_their_prompt_and_apart(capsys):
    words = ["--prompt", "ROMEO:", "--max_new_tokens", "20", "--num_samples", "3"]
    status, output = sampled(capsys, *words)
    texts = output.out.rstrip("\n").split("\n---\n")
    assert status == 0
    assert len(texts) == 3
    assert all(text.startswith("ROMEO:") for text in texts)


def test_a_stop_text_ends_the_sample(capsys):
    words = ["--prompt", "ROMEO:", "--temperature", "0", "--max_new_tokens", "60"]
    _, output = sampled(capsys, *words, "--stop", "?", "\n\n")
    assert output.out.startswith("ROMEO:")
    assert "?" not in output.out
    assert "\n\n" not in output.out.rstrip("\n")


def test_the_prompt_may_come_from_a_file_or_a_pipe(capsys, tmp_path, monkeypatch):
    words = ["--temperature", "0", "--max_new_tokens", "10"]
    _, expected = sampled(capsys, "--prompt", "JULIET:\n", *words)
    (tmp_path / "prompt.txt").write_text("JULIET:\n")
    _, from_file = sampled(capsys, "--prompt_file", str(tmp_path / "prompt.txt"), *words)
    with (tmp_path / "prompt.txt").open() as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        _, from_pipe = sampled(capsys, *words)
    assert expected.out == from_file.out == from_pipe.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model", "configs/nothing"],
            "model is 'configs/nothing', which is not a folder of a run",
        ),
        (["--model", "EMPTY"], "a folder without a checkpoint or a model"),
        (["--prompt_file", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["--prompt_file", "LATIN"], "latin.txt is not UTF-8 text"),
        (["--prompt", "naïve"], "the character 'ï' (U+00EF) is not in the tokenizer's vocabulary"),
        (
            ["--prompt", "ROMEO: " * 9, "--past_context", "stop"],
            "the prompt has 63 tokens, and the model's context_length is 16",
        ),
        (["--device", "cuda"], "device is 'cuda', which torch does not find; choose from"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(words, said, capsys, tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.chdir(ROOT)
    places = {"EMPTY": str(tmp_path), "LATIN": str(tmp_path / "latin.txt")}
    words = [places.get(word, word) for word in words]
    if "--prompt" not in words and "--prompt_file" not in words:
        words += ["--prompt", "x"]
    status, output = sampled(capsys, *words)
    assert status == 2
    assert said in output.err
    assert output.err.startswith("sample.py: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    monkeypatch.setenv("GPT_TRACEBACK", "1")
    with pytest.raises(ValueError, match=re.escape(said)):
        sampled(capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "temperature is -1.0, and must be at least 0"),
        (["--top_p", "0"], "top_p is 0.0, and must be above 0 and at most 1"),
        (["--top_p", "2"], "top_p is 2.0, and must be above 0 and at most 1"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0, and must be at least 1"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence_with_status_2(
    words, said, capsys, monkeypatch
):
    assert main(["sample", *words]) == 2
    assert capsys.readouterr().err == f"gpt: {said}\n"
    monkeypatch.setenv("GPT_TRACEBACK", "1")
    with pytest.raises(UsageError, match=re.escape(said)):
        main(["sample", *words])


def test_a_misspelt_option_gets_the_right_one_with_status_2(capsys):
    assert main(["sample", "--tempratur", "1"]) == 2
    said = "gpt: unknown option '--tempratur'; did you mean --temperature?\n"
    assert capsys.readouterr().err == said


def test_a_model_that_is_not_there_is_told_with_the_runs_that_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["sample", "--model", "", "--prompt", "x"]) == 2
    assert "model is empty, and must be the name of a model" in capsys.readouterr().err
    assert main(["sample", "--model", "nosuch", "--prompt", "x"]) == 2
    assert "model is 'nosuch', and there is no such folder here, and" in capsys.readouterr().err
    (tmp_path / "runs" / "book").mkdir(parents=True)
    (tmp_path / "runs" / "book" / "tokenizer.json").touch()
    assert main(["sample", "--model", "nosuch", "--prompt", "x"]) == 2
    assert "no such folder here (there are the runs runs/book), and" in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    assert main(["trian"]) == 2
    assert (
        "unknown command 'trian'; choose from train, sample, serve, prepare, inspect, tokenizer, "
        "evaluate, export, plan, report, doctor; did you mean train?" in capsys.readouterr().err
    )


def test_prepare_has_one_option_for_its_folder(capsys):
    assert main(["prepare", "--data.cache_dir", "cache"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "takes no data.cache_dir ('cache'); give --out cache" in said


def test_prepared_tokens_are_found_by_a_run(text_file, tmp_path, capsys):
    words = ["prepare", "--data.source", str(text_file), "--out", str(tmp_path / "cache")]
    assert main(words) == 0
    assert "training tokens in 1 file," in capsys.readouterr().out
    words = train_words(tmp_path / "cache", tmp_path, "--training.max_steps", "1")
    assert main(words) == 0
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_ends_training_with_a_checkpoint_and_a_status(number, status, text_file, tmp_path):
    words = train_words(text_file, tmp_path, "--training.max_steps", "100000")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = iter(process.stdout.readline, "")
    assert any("step      2/" in line for line in lines)
    process.send_signal(number)
    rest = "".join(lines)
    assert process.wait() == status
    process.stdout.close()
    stopped = re.search(r"stopped at step ([\d,]+), which is saved; continue with: (.*)", rest)
    assert stopped, rest
    step = int(stopped[1].replace(",", ""))
    assert (tmp_path / "run" / "last").read_text() == f"step-{step:08d}\n"
    run = subprocess.run(
        [sys.executable, *stopped[2].split()[1:], "--training.max_steps", str(step + 2)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert f"step {step + 2:,}: validation" in run.stdout


SLOW_DISK = """
import sys, threading
from gpt import checkpoint
from gpt.cli import main
checkpoint._finish = lambda *arguments: threading.Event().wait(60)
sys.exit(main(sys.argv[1:], prog="train.py"))
"""


def test_a_second_ctrl_c_ends_training_at_once_and_what_was_saved_stays_whole(text_file, tmp_path):
    words = train_words(text_file, tmp_path, "--training.max_steps", "2", "--evaluation.every", "2")
    assert main(words) == 0
    words = train_words(text_file, tmp_path, "--training.max_steps", "100000", "--resume")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = iter(process.stdout.readline, "")
    assert any("step      4/" in line for line in lines)
    process.send_signal(signal.SIGINT)
    while not list((tmp_path / "run" / "checkpoints").glob(".step-*/training.safetensors")):
        threading.Event().wait(0.01)  # for the thread that writes, and finds the disk slow
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - start < 5
    process.stdout.close()
    assert checkpoints.find(tmp_path / "run", "last").step == 2
    words = train_words(text_file, tmp_path, "--training.max_steps", "4", "--resume")
    assert main(words) == 0


def test_two_runs_on_one_folder_do_not_train_at_once(text_file, tmp_path):
    words = train_words(text_file, tmp_path, "--training.max_steps", "100000")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words[1:]], stdout=subprocess.PIPE, text=True
    )
    assert any("step      2/" in line for line in iter(process.stdout.readline, ""))
    before = (tmp_path / "run" / "config.toml").read_text()
    second = subprocess.run(
        [sys.executable, ROOT / "train.py", *words[1:], "--resume", "--log.every", "7"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    process.kill()
    process.stdout.close()
    process.wait()
    assert second.returncode == 2
    assert second.stderr == (
        f"train.py: {tmp_path / 'run'} is in use by another process that trains it: wait until "
        "it ends, or start another run with --run_dir\n"
    )
    assert (tmp_path / "run" / "config.toml").read_text() == before


def test_on_a_terminal_prompts_are_asked_for_until_ctrl_d():
    words = ["--model", str(RUN), "--temperature", "0", "--max_new_tokens", "12"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "sample.py"), *words])
    seen = read_until(terminal, "> ")
    assert "Ctrl-D ends" in seen
    os.write(terminal, b"ROMEO:\n")
    answer = read_until(terminal, "> ")
    assert (
        "ROMEO:" in answer.split("ROMEO:", 1)[1]
    )  # the echo, then the prompt and its continuation
    os.write(terminal, "naïve\n".encode())
    assert "U+00EF" in read_until(terminal, "> ")  # a mistake does not end the session
    os.write(terminal, b"\x04")
    read_until(terminal, None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def read_until(terminal, text):
    """What the terminal shows up to a prompt at the start of a line, or up to its end."""
    raw, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                raw += os.read(terminal, 4096)
            except OSError:  # how Linux tells the end of a terminal
                return raw.decode()
        seen = raw.decode(errors="replace")
        if text and re.search(rf"(^|\n){re.escape(text)}$", re.sub(r"\x1b\[[?\d]*[a-z]", "", seen)):
            return seen
    raise AssertionError(f"{text!r} did not come: {seen!r}")


@pytest.mark.parametrize("escaped", [r"\n", "\n"])
def test_a_newline_can_be_given_as_a_stop_text(escaped, capsys):
    words = ["--prompt", "ROMEO:\nBut", "--temperature", "0", "--max_new_tokens", "40"]
    _, output = sampled(capsys, *words, "--stop", escaped)
    assert output.out.startswith("ROMEO:\nBut")
    assert "\n" not in output.out[len("ROMEO:\nBut") :].removesuffix("\n")


def test_a_prompt_is_read_as_the_text_of_training(capsys, tmp_path, monkeypatch):
    words = ["--temperature", "0", "--max_new_tokens", "8"]
    _, expected = sampled(capsys, "--prompt", "ROMEO:\nBut", *words)
    windows = "\ufeffROMEO:\r\nBut".encode()
    (tmp_path / "p.txt").write_bytes(windows)
    assert sampled(capsys, "--prompt_file", str(tmp_path / "p.txt"), *words)[1].out == expected.out
    assert sampled(capsys, "--prompt", windows.decode(), *words)[1].out == expected.out
    with (tmp_path / "p.txt").open() as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert sampled(capsys, *words)[1].out == expected.out


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_prompt_file_that_is_no_file_is_told(kind, capsys, tmp_path):
    path = tmp_path / "p.txt"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    status, output = sampled(capsys, "--prompt_file", str(path))
    assert status == 2
    assert f"prompt_file {path} is a " in output.err


@pytest.mark.parametrize("name", ["out", "explain"])
def test_a_file_that_cannot_be_written_is_told_before_the_model_is_loaded(
    name, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("gpt.interop.load.load", None)
    path = tmp_path / "x.html"
    os.mkfifo(path)
    words = ["--prompt", "x", "--explain", str(path)]
    if name == "out":
        words = ["--prompt_file", "p.jsonl", "--out", str(path)]
    status, output = sampled(capsys, *words)
    assert status == 2
    assert output.err == f"sample.py: {name} {path} is a pipe or a device, and must be a file\n"


def test_a_process_that_tells_no_mistake_waits_for_the_one_that_does(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--training.max_stpes=3"]) == 2
        assert ("max_stpes" in capsys.readouterr().err, len(waited)) == (rank == "0", int(rank))
