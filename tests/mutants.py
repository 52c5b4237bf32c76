"""``make mutants``: small changes of the program (mutmut's operators), each of which some test
should notice.

Mutants are drawn by a seed from all that the operators make of ``MODULES``. Each is written into a
copy of the project, and a fork of this process, which has imported torch already, runs the tests of
the module's own folder there until one fails. A first run of those tests notes how long each takes
and which lines it reaches, so that only those that reach a mutant's line are run, the fastest
first; and at last those that start other processes.

Not mutated: annotations, decorators, docstrings, and strings with a space, which are prose.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import coverage
import libcst as cst
import pytest
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parent.parent
MODULES = {  # a pattern of modules, and the tests that they are run against
    "gpt/model/*.py": "tests/model",
    "gpt/generation/sampling.py": "tests/generation",
    "gpt/generation/decode.py": "tests/generation",
    "gpt/generation/beam.py": "tests/generation",
    "gpt/generation/speculative.py": "tests/generation",
    "gpt/generation/batch.py": "tests/generation",
    "gpt/data/batches.py": "tests/data",
    "gpt/training/optimizer.py": "tests/training",
    "gpt/training/muon.py": "tests/training",
    "gpt/training/schedule.py": "tests/training",
    "gpt/training/loop.py": "tests/training",
    "gpt/checkpoint.py": "tests/test_checkpoint.py",
}
COPIED = ["configs", "gpt", "tests", "pyproject.toml", "sample.py", "train.py"]
PRELOADED = ["torch", "torch.distributed.checkpoint", "transformers", "hypothesis", "tokenizers"]
PRELOADED += ["numpy", "rich", "safetensors.torch", "tiktoken", "tyro", "filelock"]
LIMITS = (signal.SIGALRM, signal.SIGPROF)
"""End a mutant whose test waits too long, or works too long."""
MEMORY = 24 << 30
"""Bytes of addresses that a mutant may have: more than torch needs, and no endless list."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mutant:
    """One change of one module."""

    module: str
    number: int
    tree: cst.Module
    node: cst.CSTNode
    mutated: cst.CSTNode

    @functools.cached_property
    def code(self) -> str:
        return self.tree.deep_replace(self.node, self.mutated).code

    def changed(self) -> range:
        """The numbers, from 1, of the lines of the original that differ."""
        old, new = (ROOT / self.module).read_text().splitlines(), self.code.splitlines()
        blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        parts = [(start, end) for tag, start, end, *_ in blocks if tag != "equal"]
        return range(parts[0][0] + 1, max(parts[-1][1], parts[0][0] + 1) + 1)

    def diff(self) -> str:
        old, new = (ROOT / self.module).read_text().splitlines(), self.code.splitlines()
        lines = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
        return "\n".join([f"{self.module}:{self.number}", *lines])


class _Visitor(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.ImportFrom):
            return False
        if isinstance(node, cst.SimpleString) and (" " in node.value or '"""' in node.value):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.found += [(node, mutated) for mutated in operator(node)]
        return True


def mutants_of(module: str) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its source."""
    tree = cst.parse_module((ROOT / module).read_text())
    visitor = _Visitor()
    tree.visit(visitor)
    for number, (node, mutated) in enumerate(visitor.found):
        yield Mutant(module, number, tree, node, mutated)


class Watch:
    """A plugin of pytest: chooses and orders the tests, notes time and lines, and limits time."""

    def __init__(self, limits: dict[str, float] | None, tracer: coverage.Coverage | None) -> None:
        self.limits, self.tracer = limits, tracer
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.starters: set[str] = set()
        """Files of tests that start other processes."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.limits is not None:
            order = {test: place for place, test in enumerate(self.limits)}
            items[:] = [item for item in items if item.nodeid in order]
            items.sort(key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        if self.limits is not None:  # of the processor's time, and of waiting
            signal.setitimer(signal.ITIMER_PROF, 10 + 5 * self.limits[item.nodeid])
            signal.setitimer(signal.ITIMER_REAL, 60 + 10 * self.limits[item.nodeid])
        start, children = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        result = yield
        self.seconds[item.nodeid] += time.monotonic() - start
        if resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > children:
            self.starters.add(item.nodeid.split("::")[0])
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.tracer:  # a fixture's lines are reached by all tests of the file
            self.tracer.switch_context(item.nodeid.split("::")[0])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        if self.tracer:
            self.tracer.switch_context(item.nodeid)


def run_tests(tree: Path, words: list[str], watch: Watch) -> int:
    """Run pytest in ``tree``, where no module of the project is imported yet."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.modules.pop("tests", None)
    options = ["-q", "--assert=plain", "--basetemp", str(tree / "temp"), "-pno:cacheprovider"]
    return int(pytest.main([*options, *words], plugins=[watch]))


def forked(action, tree: Path) -> int:
    """Start ``action()`` in a process of its own; its number."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            for number in (signal.SIGHUP, signal.SIGQUIT):  # which nohup ignores
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


def copy(tree: Path) -> Path:
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    return tree


class Baseline:
    """What the tests of a folder do without a mutant: seconds, and who reaches which lines."""

    def __init__(self, folder: str, modules: list[str], tree: Path) -> None:
        files = sorted([*ROOT.glob("gpt/**/*.py"), *ROOT.glob("tests/*.py"), ROOT / folder])
        files += sorted((ROOT / folder).glob("*.py"))
        digest = hashlib.sha256(repr(modules).encode())
        for file in files:
            if file.is_file() and file != Path(__file__):
                digest.update(file.read_bytes())
        kept = ROOT / "build" / "mutants" / f"{digest.hexdigest()[:16]}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            print(f"running {folder} without a mutant", flush=True)
            pid = forked(lambda: self._measure(folder, modules, tree, kept), tree)
            if os.waitpid(pid, 0)[1]:
                sys.exit((tree / "log").read_text() + f"\n{folder} fails without a mutant")
        self.seconds, self.reached, self.starters = json.loads(kept.read_text())

    @staticmethod
    def _measure(folder: str, modules: list[str], tree: Path, kept: Path) -> int:
        include = [str(tree / module) for module in modules]
        tracer = coverage.Coverage(data_file=None, config_file=False, include=include)
        tracer.start()
        watch = Watch(None, tracer)
        status = run_tests(tree, [folder], watch)
        tracer.stop()
        data = tracer.get_data()
        reached = {m: data.contexts_by_lineno(str(tree / m)) for m in modules}
        if status == 0:
            kept.write_text(json.dumps([watch.seconds, reached, sorted(watch.starters)]))
        return status

    def tests(self, mutant: Mutant) -> dict[str, float]:
        """Those that reach the mutant, in the order to run them, with their seconds; then those
        that start other processes, where nothing is traced.

        For what runs at import, all that reach the module.
        """
        reached = self.reached[mutant.module]
        lines = statement(ROOT / mutant.module, mutant.changed())
        contexts = {c for line in lines for c in reached.get(str(line), [])}
        if contexts == {""}:
            contexts = {c for line in reached.values() for c in line}
        own = f"test_{Path(mutant.module).stem}.py"

        def order(test: str) -> tuple[bool, bool, bool, float]:
            return untraced(test), self.seconds[test] > 1, own not in test, self.seconds[test]

        def untraced(test: str) -> bool:
            return not {test, test.split("::")[0]} & contexts

        chosen = [t for t in self.seconds if not untraced(t) or t.split("::")[0] in self.starters]
        chosen.sort(key=order)
        return {test: self.seconds[test] for test in chosen}


def statement(path: Path, lines: range) -> range:
    """``lines`` and those of the smallest statement around them, without the statements in it."""
    found = lines
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.stmt) and node.end_lineno is not None:
            body = getattr(node, "body", None)
            end = body[0].lineno if body and body[0].lineno > node.lineno else node.end_lineno + 1
            if lines[0] in range(node.lineno, end):
                found = range(node.lineno, max(end, lines[-1] + 1))  # the innermost comes last
    return found


def outcomes(mutants: list[Mutant], trees: list[Path], baselines: dict[str, Baseline]):
    """Each mutant with how it ended, as they end, as many at a time as there are ``trees``."""
    waiting, running = mutants[::-1], {}
    while waiting or running:
        while waiting and len(running) < len(trees):
            tree = next(t for t in trees if t not in [place for _, place in running.values()])
            mutant = waiting.pop()
            limits = baselines[mutant.module].tests(mutant)
            path = tree / mutant.module
            path.write_text(mutant.code)
            Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)

            def act(tree=tree, limits=limits) -> int:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.alarm(120)
                files = list(dict.fromkeys(test.split("::")[0] for test in limits))
                return run_tests(tree, ["-x", *files], Watch(limits, None)) if files else 0

            running[forked(act, tree)] = mutant, tree
        pid, status = os.wait()
        mutant, tree = running.pop(pid)
        shutil.copy(ROOT / mutant.module, tree / mutant.module)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what its tests have started
        timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in LIMITS
        yield mutant, "timed out" if timed_out else "killed" if status else "survived"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, help="how many mutants are drawn; all by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="MODULE or MODULE:NUMBER")
    args = parser.parse_args()
    sys.dont_write_bytecode = False
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py has it
    for name in PRELOADED:
        importlib.import_module(name)

    folders = collections.defaultdict(list)
    for pattern, folder in MODULES.items():
        for path in sorted(ROOT.glob(pattern)):
            folders[folder].append(str(path.relative_to(ROOT)))
    mutants = [m for group in folders.values() for module in group for m in mutants_of(module)]
    n_all = len(mutants)
    if args.only:
        mutants = [m for m in mutants if {m.module, f"{m.module}:{m.number}"} & {*args.only}]
    random.Random(args.seed).shuffle(mutants)
    mutants = mutants[: args.n]
    print(f"{len(mutants)} of {n_all} mutants, seed {args.seed}", flush=True)

    start = time.monotonic()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as scratch:
        trees = [copy(Path(scratch).resolve() / str(i)) for i in range(args.processes)]
        baselines = {}
        for folder, modules in folders.items():
            if any(m.module in modules for m in mutants):
                baselines |= dict.fromkeys(modules, Baseline(folder, modules, trees[0]))
        for n, (mutant, outcome) in enumerate(outcomes(mutants, trees, baselines), 1):
            counts[mutant.module][outcome] += 1
            if outcome != "killed":
                print(f"\n{n}: {outcome}: {mutant.diff()}", flush=True)
    columns = ("killed", "timed out", "survived")
    print("\n| module | tried | killed | timed out | survived |\n|---|---|---|---|---|")
    counts["all"] = sum(counts.values(), collections.Counter())
    for module, count in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        row = [module, count.total(), *(count[column] for column in columns)]
        print("|", " | ".join(map(str, row)), "|")
    print(f"{time.monotonic() - start:.0f} s")
    return int(bool(counts["all"]["survived"]))


if __name__ == "__main__":
    sys.exit(main())
