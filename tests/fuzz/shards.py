"""Prepared tokens that are damaged, and texts that are no plain files of text."""

import os
import random
import struct
from pathlib import Path

import numpy as np

from gpt.data.shards import HEADER_BYTES
from tests.fuzz import mutate
from tests.fuzz.child import Attempt, Place
from tests.fuzz.uses import command, damage, files_of


def case(chance: random.Random, place: Place) -> Attempt:
    """Prepared tokens that are damaged, or a text that is no plain file of text."""
    source = place.copy("book.txt")
    if chance.random() < 0.3:
        done = sources(chance, source, place)
        given = chance.choice((source, source.parent, ".", "..", f"{source.parent}/../inside"))
        tokenizer = ("--data.tokenizer", chance.choice(("char", "byte")))
        words = ("prepare", "--data.source", given, "--out", place.inside / "new", *tokenizer)
        return Attempt(f"{done}; prepare", command(*words), keeps=[source])
    if chance.random() < 0.3:
        return corpus(chance, source, place)
    run = place.copy("run")
    [data], steps = (run / "data").iterdir(), list((run / "checkpoints").iterdir())
    path = data / chance.choice(("train.bin", "train.bin", "validation.bin", "tokenizer.json"))
    whole, done = path.read_bytes(), f"{path.name}: "
    kind = chance.choice(("header", "ids", "ids", "any"))
    if path.suffix != ".bin" or kind == "any":
        kind, done = "any", done + damage(chance, path, place, files_of(data))
    elif kind == "header":
        at, form = chance.choice(((8, "<I"), (12, "<I"), (16, "<Q"), (24, "<Q"), (32, "<Q")))
        number = chance.choice((0, 1, 2, 3, 4, 8, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
        value = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        done += f"{number} at byte {at} of the header"
    else:
        ids = np.frombuffer(whole[HEADER_BYTES:], np.uint16).copy()
        at = chance.randrange(len(ids))
        ids[at] = (int(ids[at]) + chance.choice((1, 60, 2**15, 2**16 - 1))) % 2**16
        path.write_bytes(whole[:HEADER_BYTES] + ids.tobytes())
        done += f"id {at} is {ids[at]}"

    def check(fine: bool) -> str:
        changed = path.is_file() and path.read_bytes()[HEADER_BYTES:] != whole[HEADER_BYTES:]
        return "damaged ids were not noticed" if fine and changed and kind == "ids" else ""

    words = ("train", run / "config.toml", "--data.source", source, "--run_dir")
    words += (run, "--resume") if chance.random() < 0.5 else ("new",)
    words += ("--data.cache_dir", run / "data", "--evaluation.sample_tokens", 0)
    words += ("--checkpoint.keep", 9, "--training.max_steps", 6)
    return Attempt(done, command(*words), keeps=steps, check=check)


def corpus(chance: random.Random, source: Path, place: Place) -> Attempt:
    """What gpt prepare wrote, or bare ids of 16 bits, damaged."""
    folder = place.copy(chance.choice(("corpus", "corpus", "ids")))
    path = chance.choice(files_of(folder))
    done = damage(chance, path, place, files_of(folder))
    again = ("prepare", source, "--out", folder, "--data.tokenizer", "byte", "--shard_tokens", 300)
    train = ("train", place.copy("start.toml"), "--run_dir", "new", "--data.source", folder)
    train += ("--evaluation.sample_tokens", 0, "--training.max_steps", 1)
    return Attempt(done, command(*chance.choice((again, train, ("inspect", folder)))), keeps=[])


def sources(chance: random.Random, source: Path, place: Place) -> str:
    """Odd files in the folder of a text, or an odd text."""
    folder = source.parent
    match chance.randrange(8):
        case 0:
            (folder / "again").symlink_to(chance.choice((".", "..", "again", "nowhere", source)))
            return "a link beside it"
        case 1:
            (Path(os.fsdecode(b"b\xe9.txt"))).write_text("text")
            return "a name that is not UTF-8"
        case 2:
            os.mkfifo(folder / "pipe")
            return "a pipe beside it"
        case 3:
            source.write_bytes(
                source.read_text().encode(chance.choice(("utf-16", "utf-16-le", "utf-32")))
            )
            return "UTF-16 or 32"
        case 4:
            return damage(chance, source, place, [])
        case _:
            mutate.content(chance, source)
            return "bytes changed"
