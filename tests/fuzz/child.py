"""One case in a forked child with limits on its time and memory: how it ended.

It may end well, or in a sentence of ``UsageError`` and status 2. All else is a finding, named by
the kind of exception and the innermost function of ``gpt`` in which it arose.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpt
from gpt import config as configs
from gpt.config import UsageError

MEMORY = 3 << 30
"""Bytes of address space that a case may take beside what is there at its start."""
FILE = 1 << 30
LONGEST_SENTENCE = 1000
ROOT = Path(gpt.__file__).parent
HARMLESS = ("fine", "sentence")
FIELDS = {
    item.name
    for kind in vars(configs).values()
    if dataclasses.is_dataclass(kind)
    for item in dataclasses.fields(kind)
}


@dataclass
class Place:
    """Where a case works: its own folder, one that it has to leave alone, and the valid things."""

    inside: Path
    outside: Path
    samples: Path

    def copy(self, name: str) -> Path:
        """A sample's copy in the case's folder."""
        source, target = self.samples / name, self.inside / name
        return Path((shutil.copytree if source.is_dir() else shutil.copy2)(source, target))


@dataclass
class Attempt:
    """What a case does."""

    what: str
    work: Callable[[], object]
    keeps: Sequence[Path] = ()
    """Files and folders that have to be afterwards what they were before."""
    check: Callable[[bool], str] = lambda fine: ""
    """What else is wrong afterwards; told whether the work ended well."""
    may_end: bool = True
    """Whether a sentence may end it."""
    may_raise: bool = False
    """Whether any exception may: only a crash counts."""
    input: bytes | None = b""
    """Standard input; ``None``: it is closed."""
    encoding: str = "utf-8"
    """Of standard input and output."""


@dataclass
class Outcome:
    """How a case ended: ``key`` is the same for findings with one cause."""

    area: str
    number: int
    kind: str
    key: str = ""
    text: str = ""
    what: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in HARMLESS


Area = Callable[[random.Random, Place], Attempt]


def run(make: Area, area: str, number: int, *, seed: int, samples: Path, limit: float) -> Outcome:
    """The outcome of case ``number``, which ``make`` makes of ``(seed, area, number)`` alone."""
    root = samples.parent / f"{area}-{number}"
    root.mkdir()
    result, log = root / "result.json", root / "log"
    process = os.fork()
    if not process:
        with log.open("wb", buffering=0) as file:
            faulthandler.enable(file)
            faulthandler.dump_traceback_later(limit, exit=True, file=file)
            chance = random.Random(f"{seed} {area} {number}")
            with contextlib.suppress(BaseException):
                _work(make, chance, Place(root / "inside", root / "outside", samples), result)
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # whom it started and left
    told = json.loads(result.read_text()) if result.exists() else {}
    said = log.read_text(errors="replace")
    outcome = Outcome(area, number, **{"kind": "harness", "key": f"no result: {said}"} | told)
    if outcome.kind == "started":
        outcome.kind = "hang" if "Timeout" in said else "crash"
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        outcome.key = f"{'' if outcome.kind == 'hang' else reason} in {_frame_of_log(said)}"
        outcome.text = said[:2000]
    shutil.rmtree(root)
    return outcome


def _work(make: Area, chance: random.Random, place: Place, result: Path) -> None:
    """In the child: the case, and its outcome in ``result``."""

    def tell(kind: str, key: str = "", text: str = "", what: str = "") -> None:
        told = {"kind": kind, "key": key, "text": text, "what": what}
        result.with_suffix(".new").write_text(json.dumps(told))
        result.with_suffix(".new").replace(result)

    os.setpgid(0, 0)
    place.inside.mkdir()
    place.outside.mkdir()
    (place.outside / "precious.txt").write_text("precious\n")
    os.chdir(place.inside)
    try:
        attempt = make(chance, place)
        before = digests([*attempt.keeps, place.outside])
        streams = _streams(place.inside.parent, attempt)
        tell("started", what=attempt.what)
        _limit()
    except BaseException:
        tell("harness", traceback.format_exc().splitlines()[-1], traceback.format_exc())
        return
    kind, key, text = _attempt(attempt, streams)
    if kind in HARMLESS:
        try:
            after = digests([*attempt.keeps, place.outside])
            changed = sorted(name for name, digest in before.items() if after.get(name) != digest)
            if changed:
                names = [os.path.relpath(name, place.inside) for name in changed]
                kind, key, text = "lost", names[0], f"changed: {', '.join(names)}"
            elif wrong := attempt.check(kind == "fine"):
                kind, key = "wrong", wrong
        except BaseException:
            kind, key, text = "harness", "check", traceback.format_exc()
    tell(kind, key, text[:4000], attempt.what)


def _attempt(attempt: Attempt, streams: tuple[Path, Path]) -> tuple[str, str, str]:
    """Kind, key and text of the work's outcome."""
    said, error, status = "", None, 0
    try:
        done = attempt.work()
        status = done if isinstance(done, int) else 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException as exception:
        error = exception
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    said = streams[1].read_bytes().decode(errors="replace")
    if error is not None and not isinstance(error, UsageError):
        text = "".join(traceback.format_exception(error))
        too_much = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if attempt.may_raise and not too_much:
            return "fine", "", text
        kind = "memory" if too_much else "traceback"
        return kind, f"{type(error).__name__} in {_frame(error)}", text
    if "Traceback (most recent call last)" in said:
        last = said.strip().splitlines()[-1].split(":")[0]
        return "traceback", f"printed {last} in {_frame_of_log(said, first=False)}", said
    if error is None and status == 0:
        return "fine", "", said
    if status not in (0, 2):
        return "traceback", f"status {status}", said
    _, named, sentence = f"\n{said}".rpartition("\ngpt: ")
    sentence = str(error) if error is not None else sentence.rstrip("\n")
    by = f" in {_frame(error)}" if error is not None else ""
    if not attempt.may_end:
        return "traceback", f"ended by UsageError{by}", sentence or said
    if error is None and not named:  # tyro's account of wrong words
        has_account = "──" in said or "---" in said
        return ("sentence", "", said) if has_account else ("message", "none", said)
    if wrong := problem_of(sentence, attempt.what):
        return "message", f"{wrong}{by}: {re.sub(r'[^a-z ]+.*', '', sentence)[:40]}", sentence
    return "sentence", "", sentence


def problem_of(sentence: str, what: str) -> str:
    """What is wrong with a sentence for the user, who did ``what``."""
    if len(sentence) > LONGEST_SENTENCE:
        return "long"
    if not sentence.replace("\n", "").isprintable():
        return "not printable"
    names_a_field = FIELDS & set(re.findall(r"\w+", sentence))
    names_a_file = set(re.findall(r"[\w.-]+", what)) & set(re.findall(r"[\w.-]+", sentence))
    names_a_file |= {"file"} & set(sentence.split())  # whatever its odd name is
    if not (names_a_field or names_a_file or "/" in sentence):
        return "names no file and no field"
    return ""


def _frame(error: BaseException) -> str:
    found = "no function of gpt"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            found = f"{path.relative_to(ROOT.parent)}:{frame.f_code.co_name}"
    return found


def _frame_of_log(text: str, *, first: bool = True) -> str:
    """The innermost function of ``gpt`` in a traceback that was printed."""
    place = re.escape(str(ROOT.parent))
    found = re.findall(rf'File "{place}/(gpt/.*?)", line \d+,? in (\S+)', text)
    return ":".join(found[0 if first else -1]) if found else "no function of gpt"


def _streams(folder: Path, attempt: Attempt) -> tuple[Path, Path]:
    """Let standard input, output and error be files of the case."""
    (folder / "input").write_bytes(attempt.input or b"")
    paths = folder / "output", folder / "error"
    for number, path in enumerate((folder / "input", *paths)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    again = functools.partial(open, encoding=attempt.encoding, closefd=False)
    sys.stdin = None if attempt.input is None else again(0)
    sys.stdout, sys.stderr = again(1, "w"), again(2, "w", errors="backslashreplace")
    return paths


def _limit() -> None:
    """Little memory, small files, no network."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("there is no network in a case")

    socket.socket.connect = socket.getaddrinfo = unreachable
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, bound in ((resource.RLIMIT_AS, size + MEMORY), (resource.RLIMIT_FSIZE, FILE)):
        resource.setrlimit(what, (bound, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """What is at each path and below it, by name; links are not followed."""
    return {str(path): _digest(path) for start in paths for path in _all(start)}


def _all(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            yield from _all(inner)


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "missing" if not path.exists() else "pipe"
