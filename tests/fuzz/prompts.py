"""Prompts in all the ways to give them; the lines of a terminal; the items of a task."""

import json
import random
import sys
from pathlib import Path

from tests.fuzz import mutate
from tests.fuzz.child import Attempt, Place
from tests.fuzz.configuration import shown
from tests.fuzz.mutate import WORDS, each
from tests.fuzz.samples import PROMPTS
from tests.fuzz.uses import command, damage

LINES = (
    "/help", "/settings", "/retry", "/explain", "/x", "/", "/explain x.html", "/stop", "/seed",
    "/seed none", "/top_k", '/stop "\\n"', '/stop ""', "/stop '", '"""', "/explain /proc/x.html",
    "/explain x.txt", "/past_context stop", "/num_beams 3", "/num_samples 2",
    "/num_beams 100000000", "/num_samples 1000000000",
)  # fmt: skip
SETTINGS = each(
    """temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty stop seed
    min_new_tokens num_samples num_beams length_penalty early_stopping past_context"""
)
OPTIONS = (
    "", "--num_beams 2", "--num_samples 3", "--num_draft_tokens 3", "--stop the", "--stop \\n",
    "--num_beams 2 --length_penalty 2000", "--num_beams 2 --length_penalty -2000", "--logprobs 2",
    "--explain", "--explain x.html", "--explain /dev/full/x.html", "--temperature 0", "--top_k 1",
    "--repetition_penalty 1e-300", "--presence_penalty 1e300", "--bias 1 1e38", "--ban 0 1 2",
    "--past_context stop", "--min_new_tokens 9", "--num_samples 2", "--num_beams 100000000",
    "--batch_size 1000000000000",
)  # fmt: skip
TEXTS = (
    *PROMPTS, "é", "\0", "\x1b[2J", "the\r\n", "\ufeffthe", "\udcff", "the " * 5000, "\n", "[/b]",
    "None",
)  # fmt: skip


def case(chance: random.Random, place: Place) -> Attempt:
    """A prompt in one of the ways to give it; the lines of a terminal; the items of a task."""
    kind = chance.choice((one_prompt, one_prompt, many_prompts, terminal, task))
    attempt = kind(chance, place, place.copy(chance.choice(("run", "other"))))
    attempt.encoding = chance.choice(("utf-8", "utf-8", "utf-8", "utf-8", "ascii", "cp1252"))
    return attempt


def one_prompt(chance: random.Random, place: Place, model: Path) -> Attempt:
    text = chance.choice(TEXTS)
    data = mutate.octets(chance, text.encode(errors="surrogateescape"))
    options = chance.choice(OPTIONS).split()
    words, given = ["sample", "--model", model, *options, "--max_new_tokens", 12], b""
    match chance.randrange(3):
        case 0:
            text = chance.choice((text, data.decode(errors="surrogateescape"))).replace("\0", "")
            words, data = [*words, f"--prompt={text}"], b""
        case 1:
            path = place.inside / "prompt.txt"
            path.write_bytes(data)
            if chance.random() < 0.2:
                data = mutate.place(chance, path, place.outside, []).encode()
            words += ["--prompt_file", path]
        case 2:
            given = None if chance.random() < 0.05 else data
    return Attempt(f"{shown(words[3:])} {data[:60]!r}", command(*words), keeps=[model], input=given)


def many_prompts(chance: random.Random, place: Place, model: Path) -> Attempt:
    file, out = place.copy("prompts.jsonl"), place.inside / "out.jsonl"
    done = []
    if chance.random() < 0.7:
        place.copy("out.jsonl")
        lines = out.read_bytes().splitlines(keepends=True)
        kept = b"".join(lines[: chance.randrange(len(lines) + 1)])
        out.write_bytes(kept[: len(kept) - chance.choice((0, 0, 1, 1, 2, 20))])
        done.append(f"out has {len(out.read_bytes())} bytes")
    if chance.random() < 0.6:
        target = chance.choice((file, file, out))
        if target.is_file() and target.read_bytes().strip():
            done.append(damage(chance, target, place, []))
    before = out.read_bytes() if out.is_file() and not out.is_symlink() else b""
    elsewhere = ("/dev/full", "/dev/null", place.inside, "no/out.jsonl", "/proc/x")
    where = chance.choice(elsewhere) if chance.random() < 0.3 else out

    def check(fine: bool) -> str:
        after = out.read_bytes() if out.is_file() else b""
        kept = before if fine and _is_json(before.rpartition(b"\n")[2]) else b""
        kept = kept or before[: before.rfind(b"\n") + 1]
        return "" if after.startswith(kept) else "completions that were there are lost"

    words = ["--prompt_file", file, "--out", where, *chance.choice(OPTIONS).split(), "--seed", 0]
    work = command("sample", "--model", model, *words, "--max_new_tokens", 3)
    return Attempt(f"{'; '.join(done)}: {shown(words)}", work, keeps=[model], check=check)


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def terminal(chance: random.Random, place: Place, model: Path) -> Attempt:
    lines = []
    for _ in range(chance.randrange(1, 6)):
        line = chance.choice((*LINES, *TEXTS))
        if chance.random() < 0.6:
            value = chance.choice([w for w in WORDS if len(w) < 400] + ["3000", "-3000"])
            line = f"/{chance.choice(SETTINGS)} {value}"
        lines.append(line)
    data = ("\n".join([*lines, "the", "/explain", ""])).encode(errors="surrogateescape")

    def work() -> int:
        sys.stdin.isatty = lambda: True
        return command("sample", "--model", model, "--max_new_tokens", 4)()

    return Attempt(repr(data), work, keeps=[model], may_end=False, input=data)


def task(chance: random.Random, place: Place, model: Path) -> Attempt:
    name = chance.choice(("lambada", "hellaswag", "choices"))
    path = place.copy(f"{name}.jsonl")
    done = damage(chance, path, place, [])
    return Attempt(done, command("evaluate", model, f"--{name}", path), keeps=[model])
