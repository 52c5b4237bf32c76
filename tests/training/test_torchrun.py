"""torchrun, as its users type it: processes that die, that are told to stop, on two nodes."""

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


@pytest.fixture
def place(tmp_path):
    (tmp_path / "text.txt").write_text("".join(LINES[i % 3] for i in range(160)))
    (tmp_path / "tiny.toml").write_text(f'{SETTINGS}[data]\nsource = "{tmp_path}/text.txt"\n')
    return tmp_path


def start(
    place, run, *words, torchrun=("--standalone", "--nproc-per-node", "2"), script="train.py"
):
    words = [str(ROOT / script), str(place / "tiny.toml"), "--run_dir", str(place / run), *words]
    if torchrun:
        words = ["-m", "torch.distributed.run", *torchrun, *words]
    return subprocess.Popen(
        [sys.executable, *words],
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
    """Wait for the step, with the run's processes still at work."""
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


def test_a_killed_rank_ends_the_job_in_seconds_and_a_restart_goes_on_as_if_nothing_had_been(place):
    finish(start(place, "whole"))
    restarts = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    job = start(place, "restarted", torchrun=restarts)
    when_at_step(place, "restarted", 20, job)
    os.kill(workers(job)[1], signal.SIGKILL)
    out, err = finish(job)
    assert re.search(r"going on from step [12]\d", out)
    assert_same(place, "restarted", "whole")

    job = start(place, "killed")
    when_at_step(place, "killed", 20, job)
    killed = time.monotonic()
    os.kill(workers(job)[1], signal.SIGKILL)
    _, err = finish(job, status=1)
    assert time.monotonic() - killed < 10
    assert err.count("process 0 of 2 has lost another one") == 1
    assert err.count("train.py: ") == 1
    assert "[rank0]: Traceback" not in err
    assert 19 <= checkpoints.find(place / "killed", "last").step < 60


def test_sigterm_to_torchrun_finishes_the_step_saves_it_and_the_run_can_go_on(place):
    finish(start(place, "whole"))
    job = start(place, "stopped")
    when_at_step(place, "stopped", 20, job)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    [step] = re.findall(r"stopped at step (\d+), which is saved", out)
    assert checkpoints.find(place / "stopped", "last").step == int(step)
    finish(start(place, "stopped", "--resume"))
    assert_same(place, "stopped", "whole")


def test_a_mistake_is_told_once(place):
    odd = ["--training.batch_tokens", "48", "--training.micro_batch_size", "1"]
    _, err = finish(start(place, "run", *odd), status=1)
    assert err.count("train.py: training.batch_tokens is 48, 3 sequences, which 2 processes") == 1
    assert err.count("train.py: ") == 1
    _, err = finish(start(place, "run", "--data.source", "no/such/file"), status=1)
    assert err.count("no/such/file") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in err


def test_two_nodes_meet_and_train_as_one(place):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    rendezvous += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "a-job"]
    options = ["--parallel.strategy", "fsdp", "--parallel.shard_size", "1"]
    nodes = [start(place, "nodes", *options, torchrun=rendezvous) for _ in range(2)]
    outputs = [finish(node)[0] for node in nodes]
    assert sorted("fsdp on 2 processes" in out for out in outputs) == [False, True]
    finish(start(place, "alone", torchrun=()))
    for one, two in zip(metrics(place, "nodes"), metrics(place, "alone"), strict=True):
        assert one["step"] == two["step"]
        for key in {"loss", "validation_loss"} & two.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-5)
