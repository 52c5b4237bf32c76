"""``make fuzz``: thousands of odd inputs, each in a process of its own; exits with 1 if one of them
ended in anything but a sentence.

``python -m tests.fuzz --only shards --case 123`` shows one case.
"""

import argparse
import collections
import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

WORKERS = 2
SHARES = {
    "configuration": 7,
    "runs": 3,
    "shards": 2,
    "texts": 2,
    "foreign": 3,
    "gguf": 27,
    "prompts": 3,
    "packed": 2,
    "interface": 7,
}
"""The areas, each a module here with a function ``case``, and the parts of the cases they take."""


def prepared(folder: Path) -> Path:
    """The samples, made in a child, so that this process, of which all cases are forks, has started
    no thread; and the modules that the child needed, loaded.
    """
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "XDG_STATE_HOME": os.devnull,
    }
    import torch

    torch.set_num_threads(1)
    from gpt import kernels
    from gpt.config import parse
    from tests.fuzz import configuration, samples

    kernels.library()
    (folder / "samples").mkdir()
    modules = folder / "modules"
    process = os.fork()
    if not process:
        status = 1
        try:
            with (folder / "log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            samples.make(folder / "samples")
            modules.write_text(json.dumps(sorted(sys.modules)))
            status = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0, (folder / "log").read_text()
    for name in json.loads(modules.read_text()):
        with contextlib.suppress(ImportError):  # some are made and not imported
            importlib.import_module(name)
    for kind, words in configuration.REQUIRED.items():
        parse(configuration.COMMANDS[kind], words, prog="gpt")  # tyro keeps what it has learned
    assert threading.active_count() == 1
    gc.freeze()
    return folder / "samples"


def outcomes(wanted: list[tuple[str, int]], samples: Path, *, seed: int, limit: float) -> Iterator:
    """The outcome of each case as it ends, from some processes that share them out."""
    from tests.fuzz.child import Outcome, run

    areas = {area: importlib.import_module(f"tests.fuzz.{area}").case for area in SHARES}
    reader, writer = os.pipe()
    for worker in range(WORKERS):
        if os.fork():
            continue
        try:
            with os.fdopen(writer, "w", buffering=1) as told:
                for area, number in wanted[worker::WORKERS]:
                    found = run(areas[area], area, number, seed=seed, samples=samples, limit=limit)
                    told.write(json.dumps(vars(found)) + "\n")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in lines:
            yield Outcome(**json.loads(line))
    for _ in range(WORKERS):
        os.wait()


def cases(n: int, only: str | None) -> list[tuple[str, int]]:
    """``n`` cases of all areas, mixed, by their shares; or of one area."""
    if only:
        return [(only, number) for number in range(n)]
    total = sum(SHARES.values())
    by_area = {area: range(-(-n * share // total)) for area, share in SHARES.items()}
    found = [(area, number) for area, numbers in by_area.items() for number in numbers]
    return sorted(found, key=lambda case: (case[1] / len(by_area[case[0]]), case[0]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=42_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SHARES, help="one area")
    parser.add_argument("--case", type=int, help="one case of it, in full")
    parser.add_argument("--limit", type=float, default=20, help="seconds for a case")
    options = parser.parse_args()
    if options.case is not None and options.only is None:
        parser.error("--case takes --only as well")
    start, known = time.monotonic(), {}
    counts = {area: collections.Counter() for area in SHARES}
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.statvfs(memory).f_bavail > 1 << 20 else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=where) as folder:
        samples = prepared(Path(folder))
        from tests.fuzz.child import digests

        wanted = cases(options.cases, options.only)
        if options.case is not None:
            wanted = [(options.only, options.case)]
        before = digests([samples])
        for done in outcomes(wanted, samples, seed=options.seed, limit=options.limit):
            counts[done.area][done.kind] += 1
            if options.case is not None:
                print(done.what, done.text, sep="\n")
            key = done.kind, done.key
            if done.is_finding:
                known.setdefault(key, []).append(done)
                if len(known[key]) == 1:
                    print(f"{done.kind}: {done.key}\n  {done.what[:300]}")
                    last = done.text.strip().splitlines()[-1:] or [""]
                    print(f"  {last[0][:300]}")
                    told = f"--seed {options.seed} --only {done.area} --case {done.number}"
                    print(f"  python -m tests.fuzz {told}", flush=True)
        assert digests([samples]) == before, "a case has changed what others begin with"
        assert sum(map(collections.Counter.total, counts.values())) == len(wanted)
    seconds = time.monotonic() - start
    for area, counter in counts.items():
        if counter:
            told = ", ".join(f"{n:,} {kind}" for kind, n in counter.most_common())
            print(f"{area:14}{counter.total():7,}: {told}")
    print(f"{sum(map(len, known.values())):,} findings, {len(known)} of them distinct")
    print(f"{len(wanted):,} cases in {seconds:.0f} s, {len(wanted) / seconds:.0f} a second")
    return int(bool(known))


if __name__ == "__main__":
    sys.exit(main())
