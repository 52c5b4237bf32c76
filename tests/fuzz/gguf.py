"""GGUF files that are damaged, or that lie about what they hold."""

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gpt
from gpt.config import UsageError
from gpt.interop.gguf.format import FORMATS, GGUF
from gpt.interop.gguf.model import described
from tests.fuzz import mutate
from tests.fuzz.child import Attempt, Place
from tests.fuzz.samples import GGUFS
from tests.fuzz.uses import damage, use

MEMORY = 2 << 20
"""Bytes that any header may take."""
NUMBERS = (0, 1, 2, 3, 7, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def case(chance: random.Random, place: Place) -> Attempt:
    """A file from a stranger."""
    path = place.copy(f"{chance.choice(GGUFS)}.gguf")
    if chance.random() < 0.05:
        done = [damage(chance, path, place, [place.copy("book.txt")])]
    else:
        file = GGUF(path)
        end = min(entry.offset for entry in file.tensors.values())
        data, done = path.read_bytes(), []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            data, what = lie(chance, data, end, [*file.metadata, *file.tensors])
            done.append(what)
        path.write_bytes(data)
    name, work = use(chance, path, place)
    if chance.random() < 0.1:
        name, work = "chat", lambda: answer(path)
    what = "; ".join([path.name, *done, name])
    return Attempt(what, lambda: measured(path, work), keeps=[path])


def answer(path: Path) -> object:
    """A conversation by the file's own template."""
    loaded = gpt.load(path)
    return gpt.chat(loaded, [{"role": "user", "content": "Speak, "}], max_new_tokens=4)


def measured(path: Path, work: Callable[[], object]) -> object:
    """``work`` with a file whose header takes no more memory than its size allows: Python's objects
    of its entries are some dozen times as large.
    """
    if path.is_file():
        tracemalloc.start()
        try:
            described(path)
        except UsageError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if peak > MEMORY + 40 * path.stat().st_size:
            raise MemoryError(f"{peak:,} bytes for a header of {path.name}")
    return work()


def lie(chance: random.Random, data: bytes, end: int, names: list[str]) -> tuple[bytes, str]:
    """Change the header, which ends at ``end``, or any bytes; and what was changed."""
    at = min(chance.randrange(end), chance.randrange(end)) if chance.random() < 0.5 else 8
    name = chance.choice(names).encode()
    after = data.find(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    match chance.randrange(8):
        case 0:
            return mutate.octets(chance, data[:end]) + data[end:], "bytes of the header"
        case 1:
            cut = chance.choice((chance.randrange(end), chance.randrange(len(data) + 1)))
            return data[:cut], f"cut at {cut}"
        case 2:
            return mutate.octets(chance, data), "any bytes"
        case 3:
            number = chance.choice(NUMBERS)
            at += chance.choice((0, 8))
            return data[:at] + struct.pack("<Q", number) + data[at + 8 :], f"{number} at {at}"
        case 4:  # the name of an entry
            other = chance.choice((*names, "", "x" * 70_000, "general.alignment", "\n")).encode()
            spelled = struct.pack("<Q", len(other)) + other
            start = after - 8 - len(name)
            return data[:start] + spelled + data[after:], f"{name!r} is {other[:40]!r}"
        case _:  # what follows a name: a type and a value, or dimensions, sizes, format and offset
            at = after + 4 * chance.randrange(8)
            number = chance.choice((*NUMBERS, *FORMATS, 4, 6, 8, 9)) % 2**32
            what = f"{number} {at - after} bytes after {name!r}"
            return data[:at] + struct.pack("<I", number) + data[at + 4 :], what
