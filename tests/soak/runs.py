"""Runs that are killed, and disks that fail under them: what is left must go on as if nothing had
happened.

A server process has torch loaded and forks a child for each run: a run of twelve steps then takes
a fraction of a second. The children meet real signals, and real errors of system calls (faults.c).
"""

import collections
import ctypes
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from gpt import checkpoint as checkpoints
from gpt.config import (
    ModelConfig,
    TrainConfig,
    UsageError,
)
from gpt.generation.text import generate
from gpt.model.gpt import GPT
from gpt.training.loop import Data, Shown
from gpt.training.run import train
from tests.tiny import tiny_run

FAULTS = {"kill": -1, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
BEFORE = 4
"""Steps that a run has made, in two checkpoints, when its disk begins to fail."""


def config_of(folder: Path, *, max_steps: int = 9, every: int = 3) -> TrainConfig:
    config = tiny_run(
        folder,
        folder.parent / "text.txt",
        model={"context_length": 8, "n_layer": 1, "n_embd": 16, "dropout": 0.1},
        data={"cache_dir": str(folder.parent / "data")},
        training={"max_steps": max_steps, "batch_tokens": 64},
        optimizer={"name": "muon", "schedule": "constant"},
        evaluation={"windows": 4, "sample_tokens": 0},
        checkpoint={"every": every},
        log={"every": 4},
    )
    return dataclasses.replace(config, resume=True)


def sample(model: GPT, data: Data) -> Shown:
    """A text that stands in the metrics, and so in the digest."""
    [text] = generate((model, data.tokenizer), "", max_new_tokens=8, seed=0)
    return Shown(text.text)


def run(config: TrainConfig) -> str:
    """Train in this process; what was printed."""
    console = Console(file=io.StringIO(), width=200)
    train(config, console=console, sample=sample)
    return console.file.getvalue()


def digest(config: TrainConfig) -> str:
    """Of all that a finished run has: weights, optimizers, progress, pointers, and the metrics but
    for times.
    """
    found = checkpoints.find(config.run, "last")
    total = hashlib.sha256()
    for name in ("model.safetensors", "training.safetensors"):
        total.update((found.path / name).read_bytes())
    facts = [found.step, found.metrics, found.progress]
    facts += [checkpoints.pointed(config.run, name) for name in ("best", "last")]
    facts += [p.name for p in sorted((config.run / "checkpoints").glob("*"))]
    for line in (config.run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        facts.append({k: v for k, v in record.items() if "second" not in k})
    total.update(json.dumps(facts, sort_keys=True).encode())
    return total.hexdigest()[:16]


def in_child(work: Callable[[], object], log: Path) -> subprocess.Popen | int:
    """Fork a child that does the work and ends with status 0; or 2 and the sentence, or 1 and the
    traceback, in ``log``.
    """
    process = os.fork()
    if process:
        return process
    status = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
    except UsageError as error:
        status = 2
        os.write(os.open(log, os.O_CREAT | os.O_WRONLY), str(error).encode())
    except BaseException:
        status = 1
        os.write(os.open(log, os.O_CREAT | os.O_WRONLY), traceback.format_exc().encode())
    os._exit(status)


def prepare(folder: Path) -> None:
    """A text, and its tokens."""
    (folder / "text.txt").write_text("Speak, speak. You are all resolved rather to die?\n" * 60)
    run(config_of(folder / "first", max_steps=1))
    shutil.rmtree(folder / "first")


def inject(folder: Path, *, stride: int = 1, kinds: tuple[str, ...] = tuple(FAULTS)) -> list[str]:
    """Let each ``stride``-th change of a file fail in each of the ways; what was told of each case
    that went wrong, after a line with the number of cases.
    """
    library = ctypes.CDLL(None)
    start = config_of(folder / "start", max_steps=BEFORE)
    run(start)

    def copy(name: str) -> TrainConfig:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "start", folder / name)
        return config_of(folder / name)

    whole = copy("whole")
    counted = folder / "count"

    def count() -> None:
        library.faults_arm(str(whole.run).encode(), 0, 0)
        run(whole)
        counted.write_text(str(library.faults_count()))

    assert os.waitpid(in_child(count, folder / "log"), 0)[1] == 0, (folder / "log").read_text()
    n_calls = int(counted.read_text())
    uninterrupted = config_of(folder / "uninterrupted")
    run(uninterrupted)
    expected = digest(uninterrupted)
    problems, ends = [], collections.Counter()
    for kind in kinds:
        for number in range(1 + kinds.index(kind), n_calls + 1, stride):
            faulty, log = copy("faulty"), folder / "log"
            log.unlink(missing_ok=True)

            def work(faulty=faulty, number=number, kind=kind) -> None:
                library.faults_arm(str(faulty.run).encode(), number, FAULTS[kind])
                run(faulty)

            _, status = os.waitpid(in_child(work, log), 0)
            ends[os.waitstatus_to_exitcode(status)] += 1
            problem = problem_of(faulty, kind, status, log, expected)
            if problem:
                problems.append(f"{kind} at call {number} of {n_calls}: {problem}")
    told = f"{ends[-9]} killed the run, {ends[2]} ended it in a sentence, {ends[0]} did no harm"
    return [f"{ends.total()} faults at {n_calls} calls: {told}", *problems]


def inject_sharded(folder: Path, *, stride: int = 1) -> list[str]:
    """As :func:`inject`, of one checkpoint that is written as shards, beside one that is there."""
    library, model = (
        ctypes.CDLL(None),
        GPT(ModelConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=8)),
    )

    def state(step: int) -> checkpoints.State:
        weights = dict(model.named_parameters())
        training = {f"{name}/exp_avg": torch.ones_like(p.detach()) for name, p in weights.items()}
        return checkpoints.State(
            step=step,
            model=model.config,
            weights=weights,
            training=training,
            progress={},
            metrics={},
        )

    def save(run: Path, step: int) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            checkpoints.save_sharded(run, state(step), dist.group.WORLD)
        except OSError as error:
            raise UsageError(f"{run}: {error}") from error

    def attempt(number: int, how: int) -> int:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.copytree(folder / "start", folder / "run")

        def work() -> None:
            library.faults_arm(str(folder / "run").encode(), number, how)
            save(folder / "run", 2)
            (folder / "count").write_text(str(library.faults_count()))

        return os.waitpid(in_child(work, folder / "log"), 0)[1]

    assert os.waitpid(in_child(lambda: save(folder / "start", 1), folder / "log"), 0)[1] == 0
    assert attempt(0, 0) == 0
    n_calls, problems, ends = int((folder / "count").read_text()), [], collections.Counter()
    for kind, how in FAULTS.items():
        for number in range(1, n_calls + 1, stride):
            end = os.waitstatus_to_exitcode(attempt(number, how))
            ends[end] += 1
            paths = (folder / "run" / "checkpoints").glob("step-*")
            try:
                steps = sorted(checkpoints.verify(path).step for path in paths)
            except UsageError as error:
                steps = [str(error)]
            if steps not in ([1], [1, 2]) or end not in (-9, 0, 2) or (end == 0 and len(steps) < 2):
                log = (folder / "log").read_text()
                problems.append(f"{kind} at call {number} of {n_calls}: {end}, {steps}, {log}")
    return [f"{ends.total()} faults at {n_calls} calls, {ends[2]} told in a sentence", *problems]


def fill(folder: Path) -> list[str]:
    """Let the disk be full from the first checkpoint on; what the run says."""
    start = config_of(folder / "faulty", max_steps=BEFORE)
    run(start)
    config, log = config_of(folder / "faulty"), folder / "log"

    def work() -> None:
        checkpoints_of = str(config.run / "checkpoints")
        ctypes.CDLL(None).faults_arm(checkpoints_of.encode(), 2, errno.ENOSPC)
        run(config)

    os.waitpid(in_child(work, log), 0)
    return [log.read_text()]


def problem_of(config: TrainConfig, kind: str, status: int, log: Path, expected: str) -> str:
    if kind == "kill":
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return f"was not killed ({status})"
    elif os.waitstatus_to_exitcode(status) not in (0, 2):
        return f"ended with {os.waitstatus_to_exitcode(status)}: {log.read_text()}"
    elif os.waitstatus_to_exitcode(status) == 2 and str(config.run) not in log.read_text():
        return f"said {log.read_text()!r}"
    paths = [p for p in (config.run / "checkpoints").iterdir() if p.name.startswith("step-")]
    try:
        valid = sorted(checkpoints.verify(path).step for path in paths)
    except UsageError as error:
        return f"left something broken: {error}"
    if len(valid) < 2 or valid[-1] < BEFORE:
        return f"lost a checkpoint: {valid} are left"
    run(config)
    if digest(config) != expected:
        return "was resumed as another run"
    return ""


def kill(
    folder: Path, *, n_runs: int, kills: int, seed: int = 0, max_steps: int = 120
) -> list[str]:
    """Kill runs at random instants and resume them; how many kills met a run at work, and the
    digest of each run, the uninterrupted one first.

    An instant is a number of seconds of the run's own processor time, so that it does not depend on
    what else the machine does. The signal of this timer has no handler: it ends a process at once,
    as SIGKILL does.
    """
    chance = random.Random(seed)
    whole = config_of(folder / "whole-run", max_steps=max_steps)
    _, status, spent = os.wait4(in_child(lambda: run(whole), folder / "log"), 0)
    assert status == 0
    duration = spent.ru_utime + spent.ru_stime
    digests, hits = [digest(whole)], 0

    def mortal(config: TrainConfig, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        run(config)

    for number in range(n_runs):
        config = dataclasses.replace(whole, run_dir=str(folder / f"killed-{number}" / "run"))
        for _ in range(kills):
            work = functools.partial(mortal, config, chance.uniform(0, duration / kills))
            status = os.waitpid(in_child(work, folder / "log"), 0)[1]
            hits += os.waitstatus_to_exitcode(status) == -signal.SIGPROF
        assert os.waitpid(in_child(lambda config=config: run(config), folder / "log"), 0)[1] == 0
        digests.append(digest(config))
    return [str(hits), *digests]


def build(folder: Path) -> Path | None:
    """faults.c compiled; ``None`` where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", str(source), "-o", str(library), "-ldl"],
        check=True,
    )
    return library


def serve(folder: Path, work: dict[str, dict]) -> dict[str, list[str]]:
    """Do each ``work``, of which the options are given, in a folder of its own, all in one process;
    what each returned.
    """
    library = build(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.runs", str(folder), json.dumps(work)],
        env=environment,
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


WORK = {"inject": inject, "inject_sharded": inject_sharded, "kill": kill, "fill": fill}


def main() -> None:
    folder, work, told = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
    torch.set_num_threads(1)
    for what, options in work.items():
        (folder / what).mkdir()
        prepare(folder / what)
        told[what] = WORK[what](folder / what, **options)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
