"""What people do with a model, and what happens to their files."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

from gpt import cli
from tests.fuzz import mutate
from tests.fuzz.child import Place
from tests.fuzz.samples import PROMPTS


def command(*words: object) -> Callable[[], int]:
    """The command line, as work."""
    return lambda: cli.main([str(word) for word in words])


def use(chance: random.Random, model: Path, place: Place) -> tuple[str, Callable[[], object]]:
    """One of the things that people do with a model."""
    weights = chance.choice(("auto", "float32", "int8", "int4"))
    book = place.copy("book.txt")
    sample = ("sample", "--model", model, "--prompt", chance.choice(PROMPTS), "--max_new_tokens", 4)
    start = ("train", place.copy("start.toml"), "--run_dir", place.inside / "new", "--init", model)
    start += ("--data.source", book, "--training.max_steps", 1)
    start += ("--evaluation.sample_tokens", 0, "--optimizer.name", "adamw")
    words = chance.choice(
        (
            (*sample, "--weights", weights),
            (*sample, "--num_beams", 2, "--weights", weights),
            ("evaluate", model, "--text", book, "--stride", 16, "--weights", weights),
            ("export", model, place.inside / "out"),
            ("export", model, place.inside / "out", "--to", "packed", "--weights", weights),
            start,
        )
    )
    return words[0], command(*words)


def damage(chance: random.Random, path: Path, place: Place, others: list[Path]) -> str:
    """Change the file at ``path`` or put something else there; what was done."""
    if chance.random() < 0.75:
        mutate.content(chance, path)
        return f"{path.relative_to(place.inside)} changed"
    there = mutate.place(chance, path, place.outside, others)
    return f"{path.relative_to(place.inside)} is now: {there}"


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.name != ".lock" and still(p))


def sha256(path: Path) -> str:
    return hashlib.sha256((still(path) or Path("none")).read_bytes()).hexdigest()


def still(path: Path) -> Path | None:
    """The path if a file is there: it may have been taken away or replaced."""
    return path if path.is_file() and not path.is_symlink() else None
