"""JSONL files: a JSON object on each line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.config import UsageError


def read_jsonl(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with all ``fields`` of their types; ``UsageError`` names a
    broken line.
    """
    items = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UsageError(f"{path} line {number} is not JSON: {reason}") from None
        for name, kind in fields.items():
            if not isinstance(item, dict) or name not in item:
                raise UsageError(f"{path} line {number} has no {name!r}")
            if not isinstance(item[name], kind):
                raise UsageError(
                    f"{path} line {number} has {item[name]!r} as its {name!r}, which must be a "
                    f"{_NAMES[kind]}"
                )
        items.append(item)
    if not items:
        raise UsageError(f"{path} has no items in it")
    return items


_NAMES = {str: "string", list: "list", int: "whole number"}
