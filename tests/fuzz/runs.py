"""Run folders of which one or two files are no more what they were."""

import hashlib
import json
import random
import shutil
from pathlib import Path

from gpt import checkpoint as checkpoints
from tests.fuzz.child import Attempt, Place
from tests.fuzz.uses import command, damage, files_of, sha256, still, use


def case(chance: random.Random, place: Place) -> Attempt:
    """A run's folder of which one or two files are no more what they were."""
    run, other = place.copy("run"), place.samples / "other"
    steps = sorted((run / "checkpoints").iterdir())
    names = ("config.toml", "tokenizer.json", "metrics.jsonl", "best", "last")
    few = [run / name for name in names]
    done = []
    for _ in range(chance.choice((1, 1, 2))):
        files = chance.choice((few, few, files_of(run), files_of(steps[-1]), files_of(steps[0])))
        if path := still(chance.choice(files or few)):
            same = other / path.relative_to(run)
            done.append(damage(chance, path, place, [same] * same.is_file() or few[1:3]))
    keep = 9
    if chance.random() < 0.05:
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(place.samples / "run" / "checkpoints", place.outside / "checkpoints")
        (run / "checkpoints").symlink_to(place.outside / "checkpoints")
        keep = 1
        done.append("checkpoints are a link to elsewhere")
    elif chance.random() < 0.5:
        done += [f"{step.name} signed" for step in steps if sign(step)]
    valid = [step for step in steps if is_valid(step)]
    if chance.random() < 0.5:
        words = ("train", run / "config.toml", "--resume")
        words += ("--training.max_steps", chance.choice((4, 5)), "--checkpoint.keep", keep)
        words += ("--run_dir", run, "--data.source", place.copy("book.txt"))
        words += ("--evaluation.every", 3)
        return Attempt("; ".join([*done, "resumed"]), command(*words), keeps=valid)
    name, work = use(chance, chance.choice((run, run, *steps)), place)
    return Attempt("; ".join([*done, name]), work, keeps=[run])


def sign(step: Path) -> bool:
    """Let ``meta.json`` fit the files that it names, as if the damage had been saved."""
    try:
        meta = json.loads((still(step / "meta.json") or Path("none")).read_text())
        for name in meta["files"]:
            if still(step / name):
                meta["files"][name] = sha256(step / name)
        del meta["sha256"]
        meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        (step / "meta.json").write_text(json.dumps(meta))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def is_valid(step: Path) -> bool:
    if not all(still(path) for path in step.iterdir()):
        return False
    try:
        checkpoints.load_model(checkpoints.verify(step))
    except Exception:
        return False
    return True
