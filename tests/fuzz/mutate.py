"""Something valid to something that is not, or hardly: bytes, JSON, TOML, words, files.

Each function takes a seeded ``random.Random``, on which alone its result depends.
"""

import contextlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 100_000
LONG = "9" * 5000
"""More digits than Python makes an integer of."""

SPLICES = (b"\xff", b"\0", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\xed\xa0\x80", b"\xc3", b"\x1b[2J")


def each(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


JSON_VALUES = each(
    r"""null true false 0 1 -1 2 0.5 -0.0 1e999 -1e999 NaN Infinity 1000000000000 1e12 [] {} [1]
    18446744073709551616 1000000000000000000000000000000 [[]] [null] "" "x" "0" "\ud800" "\u0000"
    "../outside/precious.txt" "int4" "meta" {"x":1} {"":null}"""
)
"""As text, because there is more of it than Python can write."""
TOML_VALUES = each(
    r"""true -1 0 1 2.5 inf nan 1000000000000 1e12 "" "x" "\u0000" "/dev/null" "é" "~nosuchuser/x"
    [] [1] {} {a=1} [[]] 1979-05-27 0xff "auto" x"""
)
GIANTS = (LONG, "[" * DEEP + "]" * DEEP, f'"{"x" * 100_000}"')
WORDS = (
    *each(
        """-1 0 1 2 3 17 0.5 -0.0 1e-9 1e999 -1e999 nan inf 1000000000000 1000000000000000
        9223372036854775808 1000000000000000000000000000000 True False None auto x é \udcff
        /dev/null /dev/full /proc/x . .. a/b ~nosuchuser/x [x] [/b] --x a=b {} 1,2 cpu int4"""
    ),
    *("", " ", "\n", LONG, "x" * 300, "x" * 100_000),
)


def octets(chance: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat or splice bytes, at one to three places."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        match chance.randrange(7):
            case 0 if a < len(data):
                data = data[:a] + bytes([data[a] ^ 1 << chance.randrange(8)]) + data[a + 1 :]
            case 1:
                data = data[:a]
            case 2:
                data = data[:a] + data[b:]
            case 3:
                data = data[:b] + data[a : a + 4096] + data[b:]
            case 4:
                data = data[:a] + chance.randbytes(chance.choice((1, 2, 8))) + data[a:]
            case _:
                at = chance.choice((0, a, len(data)))
                data = data[:at] + chance.choice(SPLICES) + data[at:]
    return data


def json_text(chance: random.Random, text: str) -> str:
    """Replace, drop, double, rename or swap values of the tree, at one to three places."""
    tree = {"": json.loads(text)}
    for i in range(chance.choice((1, 1, 1, 2, 3))):
        holder, key = _place(chance, tree)
        kind = chance.randrange(10)
        if holder is tree or kind < 6:
            holder[key] = f"<{i}>" if chance.random() < 0.8 else _near(chance, holder[key])
        elif kind == 6:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, holder[chance.randrange(len(holder))])
        elif kind == 7:
            holder[f"<same {i} as {key}>"] = f"<{i}>"
        elif kind == 8:
            holder[chance.choice((key + "x", "", "\ud800", "-1", "1" * 30))] = holder.pop(key)
        else:
            other = chance.choice(list(holder))
            holder[key], holder[other] = holder[other], holder[key]
    text = json.dumps(tree[""], ensure_ascii=chance.random() < 0.5)
    for i in range(3):
        for key in [k.split(">")[0] for k in text.split(f"<same {i} as ")[1:]]:
            text = text.replace(f"<same {i} as {key}>", key)
        giant = chance.random() < 0.1
        text = text.replace(f'"<{i}>"', chance.choice(GIANTS if giant else JSON_VALUES))
    return text


def _place(chance: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container and a key in it, at any depth with like chances."""
    holder, key = tree, ""
    while isinstance(inner := holder[key], dict | list) and inner and chance.random() < 0.8:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, chance.choice(keys)
    return holder, key


def _near(chance: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return chance.choice((value + 1, value - 1, -value, value * 2, str(value), float(value)))
    if isinstance(value, str):
        return chance.choice((value[:-1], value + "x", value * 2, value.upper(), [value], "\x00"))
    return chance.choice((list(value) * 2, list(value)[:-1], str(value), None))


def toml_text(chance: random.Random, text: str) -> str:
    """Replace a value, or double, drop or rename a line; or change bytes, which stay UTF-8."""
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
        name, sign, _ = lines[at].partition("=")
        match chance.randrange(10):
            case 6:
                lines.insert(at, lines[chance.randrange(len(lines))])
            case 7:
                del lines[at]
                lines = lines or [""]
            case 8:
                lines[at] = chance.choice(("[", "[x]", "[[model]]", "[model.vocab_size]", "x = 1"))
            case 9:
                return octets(chance, "\n".join(lines).encode()).decode(errors="ignore")
            case _ if sign:
                giant = chance.random() < 0.1
                lines[at] = f"{name}= {chance.choice(GIANTS if giant else TOML_VALUES)}"
    return "\n".join(lines)


def words(chance: random.Random, fields: dict[str, str]) -> list[str]:
    """Options of one or two of the ``fields``, with values that may be anything."""
    found = []
    for _ in range(chance.choice((1, 1, 2))):
        name = f"--{chance.choice(list(fields))}"
        if chance.random() < 0.03:
            name = chance.choice((name[:-1], name + "x", name.replace("_", "-"), "-", "--", "x"))
        value = chance.choice(WORDS)
        match chance.randrange(5):
            case 0:
                found += [name]
            case 1:
                found += [name, value, chance.choice(WORDS)]
            case 2:
                found += [f"{name}={value}"]
            case _:
                found += [name, value]
    return [word.replace("\0", "") for word in found]


def safetensors(chance: random.Random, data: bytes) -> bytes:
    """Change the header, its length, or any bytes."""
    size = int.from_bytes(data[:8], "little")
    match chance.randrange(4):
        case 0:
            return octets(chance, data)
        case 1:
            wrong = chance.choice((0, 1, size - 1, size + 1, len(data), 10**8, 2**63, 2**64 - 1))
            return struct.pack("<Q", wrong) + data[8:]
        case _:
            header = json_text(chance, data[8 : 8 + size].decode()).encode(errors="replace")
            return struct.pack("<Q", len(header)) + header + data[8 + size :]


def content(chance: random.Random, path: Path) -> None:
    """Change what the file at ``path`` holds, in a way that suits its name; bytes of it if that was
    done before.
    """
    data = path.read_bytes()
    changed = octets(chance, data)
    if chance.random() < 0.7 and path.suffix in _CHANGES:
        with contextlib.suppress(ValueError, RecursionError):
            changed = _CHANGES[path.suffix](chance, data)
    path.write_bytes(changed)


def _json_line(chance: random.Random, data: bytes) -> bytes:
    lines = data.decode().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = json_text(chance, lines[at])
    return "\n".join([*lines, ""]).encode(errors="surrogatepass")


_CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": lambda c, data: json_text(c, data.decode()).encode(errors="surrogatepass"),
    ".jsonl": _json_line,
    ".toml": lambda c, data: toml_text(c, data.decode()).encode(),
    ".safetensors": lambda c, data: safetensors(c, data),
}


def place(chance: random.Random, path: Path, outside: Path, others: list[Path]) -> str:
    """Put something else at ``path``: nothing, a folder, a pipe, a link, a file; what."""
    others = [other for other in others if other != path]
    path.unlink()
    kind = chance.choice(("nothing", "empty", "folder", "pipe", "link", "device", "other", "other"))
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
        (path / "x").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        targets = (path.name, "nowhere", outside / "precious.txt", outside, path.parent)
        path.symlink_to(target := chance.choice(targets))
        kind = f"link to {target}"
    elif kind == "device":
        path.symlink_to(target := chance.choice(("/dev/null", "/dev/zero", "/dev/full")))
        kind = f"link to {target}"
    elif kind == "other" and others:  # else there is nothing
        other = chance.choice(others)
        path.write_bytes(other.read_bytes())
        kind = f"copy of {other.name}"
    return kind
