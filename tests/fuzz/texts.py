"""Texts in files of records, compressed or not, that are damaged: JSONL, Parquet; gzip, bzip2, xz,
zstd.
"""

import random
from pathlib import Path

from tests.fuzz import mutate
from tests.fuzz.child import Attempt, Place
from tests.fuzz.samples import COMPRESSED, parquet
from tests.fuzz.uses import command

KINDS = ("jsonl", "jsonl", "parquet", "parquet", *(f"jsonl{ending}" for ending in COMPRESSED))


def case(chance: random.Random, place: Place) -> Attempt:
    """A file of records whose bytes are changed, or what is packed in it, to be prepared."""
    kind = chance.choice(KINDS)
    path = place.inside / f"text.{kind}"
    if kind == "parquet" and chance.random() < 0.3:
        done = odd_columns(chance, path)
    elif path.suffix in COMPRESSED and chance.random() < 0.5:
        inner = place.copy("text.jsonl")
        mutate.content(chance, inner)
        path.write_bytes(COMPRESSED[path.suffix](inner.read_bytes()))
        inner.unlink()
        done = "changed, and then compressed"
    else:
        place.copy(path.name)
        mutate.content(chance, path)
        done = "changed"
    words = ("--data.bad_bytes", chance.choice(("refuse", "replace")))
    words += ("--data.text_field", chance.choice(("text", "text", "text", "id")))
    words += ("--duplicates", chance.choice(("keep", "exact")), "--data.tokenizer", "byte")
    given = chance.choice((path, path.parent))
    out = place.outside.parent / "prepared"
    work = command("prepare", given, "--out", out, *words)
    return Attempt(f"{path.name} {done}; {' '.join(words)}", work, keeps=[path])


def odd_columns(chance: random.Random, path: Path) -> str:
    """Write a file whose texts are other values."""
    odd = chance.choice(
        ([1, 2, None], [None] * 3, [b"\xff\xfe", b"a", None], [["a"], ["b"], []], [{"a": 1}] * 3,
         [True, False, None], ["\0", "", "a"], [1.5, float("nan"), None], [])
    )  # fmt: skip
    path.write_bytes(parquet({"text": odd, "id": [0] * len(odd)}))
    return f"with the texts {odd}"
