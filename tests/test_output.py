"""Whatever is at the ends of a command, it does not end in a traceback."""

import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from gpt import cli
from gpt.cli import main
from tests.test_cli import ROOT, RUN, train_words

SAMPLE = [
    sys.executable, str(ROOT / "sample.py"), "--model", str(RUN), "--device", "cpu",
    "--weights", "float32", "--max_new_tokens", "12", "--seed", "1",
]  # fmt: skip


def shell(line, *words, **variables):
    """What ``bash`` says of a line, in which ``"$@"`` is the words."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", *words],
        capture_output=True, env=own | {"PYTHONPATH": str(ROOT)} | variables, check=False,
    )  # fmt: skip
    assert b"Traceback" not in run.stderr, run.stderr.decode()
    assert b"Exception ignored" not in run.stderr, run.stderr.decode()
    return run


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book [b]é:cat:.txt"
    path.write_text("MENENIUS: déjà vu, my countrymen.\n" * 300, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "ascii", "C"],
)
def test_a_run_writes_its_curve_and_samples_to_a_log_of_any_encoding(book, tmp_path, variables):
    words = train_words(book, tmp_path, "--training.max_steps", "3", "--evaluation.every", "1")
    line = '"$@" > "$LOG"'
    if "LC_ALL" not in variables:  # there a file's name is no text
        line += ' && "$PYTHON" -m gpt prepare --data.source "$BOOK" --out "$LOG-data" >> "$LOG"'
    log = tmp_path / "log"
    variables = variables | {"LOG": str(log), "BOOK": str(book), "PYTHON": sys.executable}
    if "LC_ALL" in variables:
        words[words.index(str(book))] = str(book.rename(tmp_path / "book [b].txt"))
    run = shell(line, sys.executable, str(ROOT / "train.py"), *words[1:], **variables)
    assert run.returncode == 0, run.stderr
    text = log.read_bytes()
    text.decode("ascii" if variables.get("PYTHONIOENCODING") != "cp1252" else "cp1252")
    assert b"\n  | " in text  # the frame of a sample
    assert b"-----" in text  # the axis of the curve
    assert re.search(rb"\|[ o]*\.[. o]*\.", text)  # the curve
    assert b"book [b]" in text


def test_names_are_shown_as_they_are_and_lines_of_a_log_are_not_wrapped(book, tmp_path):
    words = ["prepare", "--data.source", str(book), "--out", str(tmp_path / ("[/b] " + "x" * 90))]
    run = shell('"$@"', sys.executable, "-m", "gpt", *words)
    [line] = run.stdout.decode().splitlines()
    assert "[/b] " + "x" * 90 in line
    assert "training tokens in 1 file," in line
    model = tmp_path / "[draft]"
    model.symlink_to(RUN)
    text = tmp_path / ("[/b] " + "long " * 15 + ".txt")
    text.write_text("ROMEO:\nBut, soft!")
    run = shell('"$@"', sys.executable, "-m", "gpt", "evaluate", str(model), "--text", str(text))
    assert run.returncode == 0, run.stderr
    assert f"{text}: perplexity" in run.stdout.decode()
    assert str(model) in run.stdout.decode()


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_may_be_closed(closed):
    run = shell(f'"$@" {closed}', *SAMPLE, "--prompt", "ROMEO:")
    assert run.returncode == 0
    assert run.stdout.startswith(b"ROMEO:") == (" >&-" not in closed)


def test_a_closed_input_holds_an_empty_prompt():
    run = shell('"$@" <&-', *SAMPLE)
    assert run.returncode == 0
    assert run.stdout == shell('"$@" < /dev/null', *SAMPLE).stdout != b""


@pytest.mark.parametrize(
    "words",
    [
        [*SAMPLE, "--prompt", "ROMEO:", "--num_samples", "400"],
        [*SAMPLE, "--prompt", "ROMEO:", "--explain"],
        [sys.executable, "-m", "gpt", "--help"],
        [sys.executable, "-m", "gpt", "evaluate", str(RUN), "--text", "TEXT"],
    ],
)
def test_a_reader_of_the_output_may_leave(words, tmp_path):
    (tmp_path / "text.txt").write_text("ROMEO:\nBut, soft!")
    words = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in words]
    assert shell('"$@" | true', *words).returncode == 1


def test_a_full_disk_behind_the_output_is_a_sentence():
    run = shell('"$@" > /dev/full', *SAMPLE, "--prompt", "ROMEO:")
    assert run.returncode == 2
    assert run.stderr.endswith(b"sample.py: standard output: No space left on device\n")


def test_a_prompt_that_is_not_utf_8_is_a_sentence():
    run = shell('printf "caf\\xe9" | "$@"', *SAMPLE)
    assert run.returncode == 2
    assert run.stderr.startswith(b"sample.py: standard input is not UTF-8 text: ")
    assert shell('"$@" --prompt "$(printf "caf\\xe9")"', *SAMPLE).returncode == 2


def test_a_prompt_may_come_through_a_pipe_that_the_shell_names():
    run = shell('"$@" --prompt_file <(printf "ROMEO:")', *SAMPLE)
    assert run.stdout.startswith(b"ROMEO:")


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK"])
def test_what_torchrun_never_sets_is_a_sentence(variable, monkeypatch, text_file, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(variable, "two")
    if variable == "RANK":  # only the first process tells of wrong words, and this one is none
        monkeypatch.setattr(os, "environ", os.environ | {})
    assert main(train_words(text_file, tmp_path)) == 2
    assert f"variable {variable} is 'two', and must be a whole" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


INTERRUPTED = """
import os, signal, sys, threading
import gpt.cli
class Interrupting:
    'Ctrl-C when a certain module is about to be imported, in the middle of what swallows errors.'
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                print("swallowed", flush=True)
sys.meta_path.insert(0, Interrupting())
sys.exit(gpt.cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("module", ["tyro", "torch", "numpy", "rich.console"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_ctrl_c_in_the_middle_of_an_import_ends_the_process(module, command):
    words = {"train": [], "evaluate": [str(RUN), "--text", "x"]}
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, command, *words[command]],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


def test_python_takes_ctrl_c_again_once_a_command_has_started(capsys, monkeypatch):
    handlers = []
    monkeypatch.setitem(cli.COMMANDS, "sample", lambda words, prog: handlers.append(told()) or 0)

    def told():
        with cli._starting():
            return signal.getsignal(signal.SIGINT)

    assert main(["sample"]) == 0
    assert handlers == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in the background
    try:
        assert told() is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_the_start_ends_training(text_file, tmp_path):
    words = train_words(text_file, tmp_path, "--training.max_steps", "1000000")
    for i in range(46):
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *words[1:], "--run_dir", str(tmp_path / str(i))],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        time.sleep(0.2 + i / 10)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130), output
        # before the command line is there, Python tells of Ctrl-C in its own way
        assert "Traceback" not in output or "from gpt.cli import main" in output


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_told_with_what_would_help(error, told, monkeypatch, capsys):
    def fail(words, prog):
        raise error

    settings = {
        "train": ("training.micro_batch_size", "training.activation_checkpointing",
                  "model.context_length"),
        "sample": ("--batch_size", "--weights", "--max_new_tokens"),
        "prepare": (),
    }  # fmt: skip
    for command, named in settings.items():
        monkeypatch.setitem(cli.COMMANDS, command, fail)
        if not told:
            with pytest.raises(RuntimeError, match="shapes"):
                main([command])
            continue
        assert main([command]) == 2
        said = capsys.readouterr().err
        assert said.startswith("gpt: not enough memory")
        assert said.count("\n") == 1
        assert all(name in said for name in named)


def test_the_package_runs_as_a_module(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "gpt", "nothing"], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("gpt: unknown command 'nothing'; choose from train,")


def test_a_wheel_runs_outside_the_checkout(tmp_path):
    pytest.importorskip("setuptools", "77", reason="setuptools 77 builds the wheel")
    build = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path / "source"), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    [wheel] = tmp_path.glob("gpt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "gpt").rglob("*.py")}
    configs = {f"gpt/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    others = [path for path in (ROOT / "gpt").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    sources = {str(path.relative_to(ROOT)) for path in others}
    assert {"gpt/kernels.cpp", "gpt/vectors.h", "gpt/server/static/page.js"} <= sources
    assert code | configs | sources <= names
    assert {name.split("/")[0] for name in names} == {"gpt", wheel.name[:9] + ".dist-info"}
    run = subprocess.run(
        [sys.executable, "-m", "gpt", "train", "--model.n_head", "5"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert run.returncode == 2
    assert "model.n_embd is 192" in run.stderr  # of configs/shakespeare.toml


BUILD = f"""
import os, shutil, sys
from setuptools import build_meta
source, out = sys.argv[1:]
for name in ("gpt", "configs"):
    shutil.copytree(os.path.join({str(ROOT)!r}, name), os.path.join(source, name),
                    ignore=shutil.ignore_patterns("__pycache__"))
for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(os.path.join({str(ROOT)!r}, name), source)
os.chdir(source)
build_meta.build_wheel(out)
"""
