"""What the README shows can be typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt import GPT, ModelConfig
from gpt.config import EvaluateConfig, ExportConfig, SampleConfig, TrainConfig, parse
from gpt.data.tokenizer import ByteTokenizer
from gpt.interop.export import export_huggingface

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAST = {
    "train.py": "--model.n_layer 1 --training.max_steps 2 --evaluation.windows 2",
    "sample.py": "--max_new_tokens 5",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if not line.startswith("make")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like the checkout's root, in which the README's runs have been made."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train.py", "sample.py", "configs", "gpt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_book.txt").write_text(
        "Once upon a time, JULIET: ROMEO: To be, or not to be.\n" * 2000
    )
    (folder / "runs").mkdir()
    return folder


def run(line, place):
    environment = os.environ | {
        "PYTHONPATH": str(place),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", line],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def shortened(line):
    for script, words in FAST.items():
        if script in line:
            return f"{line} {words}"
    return line


def test_the_readmes_commands_run_in_their_order(place):
    # `make demo` stands first in the README, and has made runs/shakespeare
    (place / "runs" / "shakespeare").symlink_to(ROOT / "tests" / "checkpoints" / "format-1")
    lines = commands()
    assert len(lines) >= 7
    for line in lines:
        if "--resume" in line:
            continue  # of the demo's run, which is not here
        done = run(shortened(line), place)
        assert done.returncode == 0, (line, done.stderr)
        if "sample.py" in line:
            assert done.stdout.strip(), line


def test_gpt2_and_back_runs_as_printed(place):
    """On a random model in a folder that has the name of the hub's."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, context_length=64, n_layer=2, n_head=2, n_embd=32)
    export_huggingface(GPT(config), ByteTokenizer(), place / "gpt2")
    [block] = [block for block in blocks("bash") if "--init" in block]
    assert block.count("\n") == 4
    for line in block.splitlines():
        words = "--training.max_steps 2 --evaluation.windows 2" if "train.py" in line else ""
        words = "--max_new_tokens 5" if "sample.py" in line else words
        done = run(f"{line} {words}", place)
        assert done.returncode == 0, (line, done.stderr)
    assert "gpt2" in done.stdout  # the comparison of both


def test_the_commands_that_need_the_hub_are_understood():
    schemas = {
        "python sample.py": SampleConfig,
        "python train.py": TrainConfig,
        "gpt export": ExportConfig,
        "gpt evaluate": EvaluateConfig,
    }
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(gpt evaluate [^`]*)`", README.replace("\n", " "))
    assert len(lines) >= 12
    for line in lines:
        command = next(name for name in schemas if line.startswith(name))
        words = shlex.split(line.removeprefix(command))
        assert isinstance(parse(schemas[command], words, prog=command), schemas[command])


def test_the_commands_of_the_docs_are_understood():
    from torch.distributed.run import get_args_parser

    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    scripts = [b for page in pages for b in re.findall(r"```(?:ba)?sh\n(.*?)```", page, re.DOTALL)]
    lines = "\n".join(scripts).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("srun ") for line in lines if "train.py" in line]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = [re.sub(r"\$SLURM_\w+", "2", word) for word in words[1:]]
            parsed = get_args_parser().parse_args(words)
            script, words = parsed.training_script, parsed.training_script_args
        else:
            script, words = words[1], words[2:]
        assert script == "train.py"
        words = [str(ROOT / word) if word.endswith(".toml") else word for word in words]
        assert isinstance(parse(TrainConfig, words, prog="train.py"), TrainConfig)


def test_the_docs_name_the_fields_and_targets_that_there_are():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for group, name in re.findall(r"`(?:--)?(\w+)\.(\w+)(?: [^`]*)?`", page):
        if group in ("metrics", "sample", "trace", "torch"):
            continue
        assert hasattr(getattr(TrainConfig(), group), name), (group, name)
    assert "`make soak`" in page
    assert "soak:" in (ROOT / "Makefile").read_text()


def test_the_readmes_python_runs(place, monkeypatch, capsys):
    if not (place / "runs" / "shakespeare").exists():
        (place / "runs" / "shakespeare").symlink_to(ROOT / "tests" / "checkpoints" / "format-1")
    monkeypatch.chdir(place)
    first, second = blocks("python")
    scope = {}
    exec(first, scope)
    assert capsys.readouterr().out.count(" length ") == 6
    exec(second, scope)
    difference = (scope["last"] - scope["logits"][:, 19:]).abs().max()
    assert difference < 1e-5


def test_the_readme_names_every_file_of_the_house():
    house = README[README.index("## The house") :]
    for path in (ROOT / "gpt").iterdir():
        if not path.name.startswith("__"):
            assert f"  {path.name}" in house, path.name


def test_what_make_offers_is_there():
    shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "soak", "lint", "format", "clean"):
        assert f"make {target} " in shown
