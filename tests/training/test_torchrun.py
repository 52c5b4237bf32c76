"""torchrun from the command line: processes that are killed or stopped, and two nodes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import gpt
from gpt import checkpoint as checkpoints
from tests.conftest import LINES

ROOT = Path(__file__).parent.parent.parent
SETTINGS = """
[model]
context_length = 16
n_layer = 1
n_head = 2
n_embd = 16
[training]
max_steps = 60
batch_tokens = 64
micro_batch_size = 2
precision = "float32"
device = "cpu"
[evaluation]
every = 10
windows = 4
sample_tokens = 5
[checkpoint]
every = 1
[log]
every = 1
"""


def make(folder):
    (folder / "text.txt").write_text("".join(LINES[i % 3] for i in range(160)))
    (folder / "tiny.toml").write_text(f'{SETTINGS}[data]\nsource = "{folder}/text.txt"\n')
    return folder


@pytest.fixture
def place(tmp_path):
    return make(tmp_path)


def start(
    place, run, *words, torchrun=("--standalone", "--nproc-per-node", "2"), script="train.py"
):
    words = [str(ROOT / script), str(place / "tiny.toml"), "--run_dir", str(place / run), *words]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *torchrun, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def when_at_step(place, run, step, process):
    """Wait for the step while the run's processes are working."""
    path = place / run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        threading.Event().wait(0.01)
    raise AssertionError(process.communicate()[1])


def workers(process):
    """The processes that torchrun started, by rank."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_text()
        found = re.search(r"\0RANK=(\d+)", environment)
        if found:
            ranks[int(found[1])] = int(pid)
    return ranks


def metrics(place, run):
    lines = (place / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def assert_same(place, run, other):
    assert metrics(place, run) == metrics(place, other)
    one, two = (gpt.load(place / name).model for name in (run, other))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on two processes, next to its text."""
    place = make(tmp_path_factory.mktemp("whole"))
    finish(start(place, "whole"))
    return place


@pytest.mark.parametrize(
    ("torchrun", "rank"),
    [
        (("--nproc-per-node", "2"), 0),
        pytest.param(("--standalone", "--nproc-per-node", "2"), 1, marks=pytest.mark.slow),
    ],
)
def test_a_restart_after_a_killed_rank_gives_the_uninterrupted_result(torchrun, rank, whole):
    run = f"restarted-{rank}"
    job = start(whole, run, torchrun=(*torchrun, "--max-restarts", "1"))
    when_at_step(whole, run, 20, job)
    os.kill(workers(job)[rank], signal.SIGKILL)
    out, _ = finish(job)
    assert re.search(r"continuing from step [12]\d", out)
    assert_same(whole, run, "whole")


def test_a_killed_rank_ends_the_job_in_seconds_with_one_error(place):
    job = start(place, "killed")
    when_at_step(place, "killed", 20, job)
    killed = time.monotonic()
    os.kill(workers(job)[1], signal.SIGKILL)
    _, err = finish(job, status=1)
    assert time.monotonic() - killed < 10
    assert err.count("process 0 of 2 has lost another process") == 1
    assert err.count("train.py: ") == 1
    assert "[rank0]: Traceback" not in err
    assert 19 <= checkpoints.find(place / "killed", "last").step < 60


@pytest.mark.slow
def test_a_restart_does_not_resume_a_run_of_another_job(whole):
    before = metrics(whole, "whole")
    restarts = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    _, err = finish(
        start(whole, "whole", "--training.max_steps", "70", torchrun=restarts), status=1
    )
    assert err.count("holds a run at step 60 already") == 2  # of two attempts
    assert metrics(whole, "whole") == before


def test_after_sigterm_to_torchrun_the_run_can_be_resumed(whole):
    job = start(whole, "stopped")
    when_at_step(whole, "stopped", 20, job)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode != 0  # torchrun's own status
    [step] = re.findall(r"stopped at step (\d+), which is saved", out)
    assert checkpoints.find(whole / "stopped", "last").step == int(step)
    finish(start(whole, "stopped", "--resume"))
    assert_same(whole, "stopped", "whole")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--training.batch_tokens", "48", "--training.micro_batch_size", "1"],
            "training.batch_tokens is 48, 3 sequences, which 2 processes",
        ),
        pytest.param(["--data.source", "no/such/file"], "no/such/file", marks=pytest.mark.slow),
        pytest.param(["--training.device", "mps"], "device is 'mps'", marks=pytest.mark.slow),
        (["--training.max_stpes", "3"], "max_stpes"),
    ],
)
def test_a_users_mistake_is_reported_once(words, said, place):
    _, err = finish(start(place, "run", *words), status=1)
    told = re.sub(r"(?s)Traceback .*|^[WE]\d{4} .*?$", "", err, flags=re.MULTILINE)  # torchrun's
    assert told.count(said) == 1, err
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in err


def rendezvous():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts=3"]
    return [*words, "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "a-job"]


def test_two_nodes_train_together_and_again_after_a_process_was_killed(whole):
    torchrun = rendezvous()
    options = ["--parallel.strategy", "fsdp"]
    nodes = [start(whole, "nodes", *options, torchrun=torchrun) for _ in range(2)]
    when_at_step(whole, "nodes", 20, nodes[0])
    other = next(node for node in nodes if 1 in workers(node))
    os.kill(workers(other)[1], signal.SIGKILL)
    outputs = [finish(node)[0] for node in nodes]
    told = "".join(outputs)
    again = re.findall(r"continuing from step (\d+)", told)  # torchrun may need more than one start
    assert again
    assert all(int(step) >= 19 for step in again)
    assert told.count("fsdp on 2 processes") == 1 + len(again)  # by one of them, at each start
    for one, two in zip(metrics(whole, "nodes"), metrics(whole, "whole"), strict=True):
        assert one["step"] == two["step"]
        for key in {"loss", "validation_loss"} & two.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-5)
