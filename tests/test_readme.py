"""What the README and the pages of docs/ show can be typed. In their blocks, `sh` marks commands
that run here as printed, and `bash` commands that need a hub, GPUs or time: these are understood.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt
from gpt import GPT, ModelConfig
from gpt.cli import main
from gpt.commands.completion import SCHEMAS as COMMANDS
from gpt.config import TrainConfig, parse
from gpt.data.tokenizer import ByteTokenizer
from gpt.interop.export import export_huggingface

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = [
    "data", "training", "finetuning", "generation", "models", "techniques", "evaluation",
    "performance",
    "architecture",
    "serving",
    "recipes",
    "tools",
]  # fmt: skip
PAGES = {"README": README} | {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES
}
FAST = {
    "train.py": "--model.n_layer 1 --training.max_steps 2 --evaluation.windows 2",
    "sample.py": "--max_new_tokens 5",
}
SCHEMAS = {f"gpt {name}": schema for name, schema in COMMANDS.items()}
SCHEMAS |= {f"python {name}.py": COMMANDS[name] for name in ("train", "sample")}


def blocks(language, page=None):
    """The fenced blocks of a language, on one page or on all."""
    text = "\n".join(PAGES.values()) if page is None else PAGES[page]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def lines_of(language):
    """The commands of all pages, each once, those that are wrapped on one line."""
    text = "\n".join(blocks(language)).replace("\\\n", " ")
    return list(dict.fromkeys(line.strip() for line in text.splitlines()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like the checkout's root, in which the README's runs have been made."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train.py", "sample.py", "configs", "gpt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_book.txt").write_text(
        "Once upon a time, JULIET: ROMEO: To be, or not to be.\n" * 600
    )
    # `make demo` stands first in the README, and has made runs/shakespeare
    (folder / "runs").mkdir()
    (folder / "runs" / "shakespeare").symlink_to(ROOT / "tests" / "checkpoints" / "format-1")
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


@pytest.fixture
def run_here(place, monkeypatch, capsys):
    """Runs a command in this process, without the seconds in which a new one imports torch; the
    status, and what was printed.
    """
    monkeypatch.chdir(place)

    def run_here(line):
        words = shlex.split(line)
        if words[0] == "python":
            words = ["gpt", words[1].removesuffix(".py"), *words[2:]]
        status = main(words[1:])
        return status, *capsys.readouterr()

    return run_here


def shortened(line):
    for script, words in FAST.items():
        if script in line:
            return f"{line} {words}"
    return line


def test_the_commands_run_in_their_order(place, run_here):
    """The shell runs the first line of each program, and those with a pipe."""
    lines = [line for line in lines_of("sh") if not line.startswith("make")]
    assert len(lines) >= 8
    started = set()
    for line in lines:
        if "--resume" in line:
            continue  # of the demo's run, which is not here
        program = tuple(line.split()[:2])
        if program in started and "|" not in line:
            status, out, err = run_here(shortened(line))
        else:
            done = run(shortened(line), place)
            status, out, err = done.returncode, done.stdout, done.stderr
            started.add(program)
        assert status == 0, (line, err)
        if "sample.py" in line:
            assert out.strip(), line


def test_gpt2_and_back_runs_as_printed(place, run_here):
    """On a random model in a folder that has the name of the hub's."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, context_length=64, n_layer=2, n_head=2, n_embd=32)
    export_huggingface(GPT(config), ByteTokenizer(), place / "gpt2")
    [block] = [block for block in blocks("bash", "README") if "--init" in block]
    assert block.count("\n") == 4
    for line in block.splitlines():
        words = "--training.max_steps 2 --evaluation.windows 2" if "train.py" in line else ""
        words = "--max_new_tokens 5" if "sample.py" in line else words
        status, out, err = run_here(f"{line} {words}")
        assert status == 0, (line, err)
    assert "gpt2" in out  # the comparison of both


def understand(line):
    """Parse a command as the program would, without running it."""
    from torch.distributed.run import get_args_parser

    line = line.removeprefix("srun ")
    if line.startswith("torchrun "):
        words = [re.sub(r"\$SLURM_\w+", "2", word) for word in shlex.split(line)[1:]]
        parsed = get_args_parser().parse_args(words)
        line = shlex.join(["python", parsed.training_script, *parsed.training_script_args])
    command = next(name for name in SCHEMAS if line.startswith(name))
    words = shlex.split(line.removeprefix(command))
    words = [str(ROOT / word) if word.endswith(".toml") else word for word in words]
    assert isinstance(parse(SCHEMAS[command], words, prog=command), SCHEMAS[command])


def test_the_commands_that_do_not_run_here_are_understood():
    starts = (*SCHEMAS, "torchrun", "srun")
    lines = [line for line in lines_of("bash") if line.startswith(starts)]
    assert sum("train.py" in line for line in lines) >= 6
    said = re.findall(r"`((?:gpt|python|torchrun) [^`]*)`", " ".join(PAGES.values()))
    said = [" ".join(line.split()) for line in said]
    lines += [line for line in said if line.startswith(starts) and " --" in line]
    shown = [line.removeprefix("$ ") for line in lines_of("text") if line.startswith("$ ")]
    lines += [line for line in shown if line.startswith(starts)]
    assert len(lines) >= 25
    for line in lines:
        if "--help" not in line and "COMMAND" not in line:
            understand(line)


def test_the_docs_name_the_fields_and_targets_that_there_are():
    config, makefile = TrainConfig(), (ROOT / "Makefile").read_text()
    for name, page in PAGES.items():
        for group, field in re.findall(r"`(?:--)?(\w+)\.(\w+)(?: [^`]*)?`", page):
            if hasattr(config, group) and field not in ("py", "toml", "json", "jsonl"):
                assert hasattr(getattr(config, group), field), (name, group, field)
        for target in re.findall(r"`make ([\w-]+)`", page):
            assert f"\n{target}:" in makefile, (name, target)
    assert "`make soak`" in PAGES["training"]


def test_the_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for page, n in (("README", 1), ("generation", 1), ("models", 1)):
        scope = {}
        assert len(blocks("python", page)) == n
        for block in blocks("python", page):
            exec(block, scope)
        said = capsys.readouterr().out
        if page == "README":
            assert said
        elif page == "generation":
            assert said.count(" length ") == 6
    difference = (scope["last"] - scope["logits"][:, 19:]).abs().max()
    assert difference < 1e-5
    assert sum(len(blocks("python", page)) for page in PAGES) == 4  # serving's is in tests/server


def test_the_readme_is_short_and_leads_to_every_page():
    assert README.count("\n") <= 150
    for page in (ROOT / "docs").iterdir():
        if page.suffix in (".md", ".ipynb"):
            assert f"(docs/{page.name})" in README, page.name


def test_each_picture_is_shown():
    for picture in (ROOT / "docs").glob("*.svg"):
        shown = f"(docs/{picture.name})" in README
        assert shown or any(f"({picture.name})" in page for page in PAGES.values()), picture.name


def test_the_links_lead_somewhere():
    for name, page in PAGES.items():
        folder = ROOT if name == "README" else ROOT / "docs"
        for target, anchor in re.findall(r"\]\(([\w./-]+)(?:#([\w-]+))?\)", page):
            path = folder / target
            assert path.exists(), (name, target)
            if anchor:
                heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in anchors, (name, target, anchor)


def test_the_list_of_files_names_every_file():
    page = PAGES["architecture"]
    house = page[page.index("## The files") : page.index("## Features")]
    packages = [path for path in (ROOT / "gpt").iterdir() if path.is_dir()]
    for path in [*(ROOT / "gpt").iterdir(), *(file for p in packages for file in p.iterdir())]:
        if not path.name.startswith("__") and path.suffix != ".pyc":
            assert re.search(rf"(?<![\w.]){re.escape(path.name)}", house), path


def test_what_make_offers_is_there():
    shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "soak", "lint", "format", "clean"):
        assert f"make {target} " in shown


@pytest.mark.parametrize("text", [README, gpt.__doc__], ids=["README", "docstring"])
def test_the_core_to_read_in_an_evening_has_the_files_and_lines_that_are_named(text):
    named = re.search(r"an evening to read: (.*?); ([\d,]+) lines in all", text, re.DOTALL)
    *model, rest = named[1].replace("`", "").split(" in gpt/model/")
    paths = [f"gpt/model/{name}" for name in re.findall(r"\w+\.py", model[0])]
    paths += re.findall(r"gpt/\w+/\w+\.py", rest)
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in paths)
    assert len(paths) == 8
    assert abs(lines - int(named[2].replace(",", ""))) <= 100
