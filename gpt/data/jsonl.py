"""JSONL files: one JSON object on each line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.files import parse_json, read_text


def read_jsonl(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a JSONL file. ``UsageError`` names a line that is broken, lacks one of the
    ``fields``, or has a value of another type.
    """
    items = []
    for number, line in enumerate(read_text(path, "the JSONL file").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{foreign(path)} line {number}"
        item = parse_json(line, where)
        for name, kind in fields.items():
            if not isinstance(item, dict) or name not in item:
                raise UsageError(f"{where} has no {name!r}")
            if not isinstance(item[name], kind) or (kind is int and isinstance(item[name], bool)):
                raise UsageError(
                    f"{where} has {quoted(item[name])} as its {name!r}, which must be a "
                    f"{_NAMES[kind]}"
                )
        items.append(item)
    if not items:
        raise UsageError(f"{foreign(path)} has no items")
    return items


_NAMES = {str: "string", list: "list", int: "whole number"}
