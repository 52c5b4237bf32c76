"""``gpt prepare`` in a process that is killed with SIGKILL at random instants."""

import gzip
import itertools
import json
import random
import subprocess
import sys

import pytest

FORKS = """
import contextlib, json, os, signal, sys, time
import gpt.cli, gpt.commands.prepare
from gpt.data import encoding, formats, local_pipeline
formats.PIECE_CHARACTERS = encoding.PIECE_CHARACTERS = 200
local_pipeline.BLOCKS_A_STEP = 4
said = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
def lines_of(path):
    with contextlib.suppress(FileNotFoundError):
        return open(path, "rb").read().count(b"\\n")
    return -1
for line in sys.stdin:
    words, journal, steps, seconds = json.loads(line)
    if not (process := os.fork()):
        sys.stdin = open(os.devnull)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os._exit(gpt.cli.main(words))
    if seconds is not None:
        running = os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
        while lines_of(journal) <= steps and os.waitid(*running) is None:
            time.sleep(0.0005)
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""A process that runs each command in a fork, and kills it some seconds after some steps are in the
journal.
"""


class Forks:
    """Runs commands, and reads what they say."""

    def __init__(self, process, said):
        self.process, self.said = process, said

    def run(self, *words, out, steps=0, seconds=None):
        """The exit status; negative: the signal."""
        words = [*map(str, words), "--out", str(out)]
        line = [words, str(out / "journal.jsonl"), steps, seconds]
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def forks(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    said = tmp_path / "said"
    with subprocess.Popen([sys.executable, "-c", FORKS, said], **pipes) as process:
        yield Forks(process, said)
        process.stdin.close()


@pytest.fixture
def source(tmp_path):
    """Records, some of them long or repeated, and a compressed text."""
    draw, folder = random.Random(0), tmp_path / "texts"
    words = [f"w{i}" for i in range(50)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 90))) for _ in range(100)]
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:30]]]
    folder.mkdir()
    for name, some in {"a": lines[:70], "c": lines[70:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(some))
    (folder / "b.txt.gz").write_bytes(gzip.compress(" ".join(texts[:20]).encode()))
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("kills", "validation", "duplicates"),
    [
        (5, "documents", "exact"),
        pytest.param(50, "documents", "exact", marks=pytest.mark.slow),
        pytest.param(50, "end", "keep", marks=pytest.mark.slow),
    ],
)
def test_a_preparation_that_is_killed_at_random_instants_has_the_same_bytes(
    kills, validation, duplicates, forks, source, tmp_path
):
    words = ["prepare", source, "--data.tokenizer", "byte", "--shard_tokens", "3000"]
    words += ["--validation", validation, "--duplicates", duplicates]
    assert forks.run(*words, out=tmp_path / "whole") == 0
    whole, draw, killed = files(tmp_path / "whole"), random.Random(kills), 0
    for number in itertools.count():
        out, status, before = tmp_path / f"killed {number}", -9, killed
        while status == -9:
            at = None if killed in (before + 10, kills) else draw.expovariate(100)
            status = forks.run(*words, out=out, steps=draw.randint(-2, 5), seconds=at)
            killed += status == -9
        assert status == 0, forks.said.read_text()
        assert files(out) == whole
        if killed == kills:
            break
    assert kills < 10 or forks.said.read_text().count("going on after ") > 5
