"""``corpus.json``, which lists the shards of a prepared folder: a folder with it is complete."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.config import PrepareConfig, UsageError, foreign, quoted
from gpt.data.corpus import CORPUS_FILE
from gpt.data.pieces import SPLITS
from gpt.data.tokenizer import Tokenizer
from gpt.files import read_json, write_atomically

Summary = dict[str, Any]


def summary_of(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    work: Mapping[str, Any],
    counts: Mapping[str, int],
    shards: Mapping[str, list[dict[str, Any]]],
) -> Summary:
    """The content of ``corpus.json``. ``UsageError`` if a split has no text."""
    sources = config.sources or (config.data.source,)
    if not counts.get("tokens"):
        raise UsageError(f"{quoted(sources[0])} has no text")
    if empty := [split for split in SPLITS if not sum(each["tokens"] for each in shards[split])]:
        raise UsageError(
            f"no document is for {empty[0]}, with validation {config.validation} and "
            f"data.validation_fraction {config.data.validation_fraction}; use more documents, "
            "another fraction, or --validation end"
        )
    return {
        "version": 1,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "sources": list(sources),
        "counts": dict(counts),
        "shards": dict(shards),
        "work": dict(work),
    }


def write_summary(folder: Path, summary: Summary) -> None:
    """Write ``corpus.json``, which makes the folder complete."""
    write_atomically(folder / CORPUS_FILE, json.dumps(summary, indent=1, sort_keys=True) + "\n")


def read_summary(folder: Path) -> Summary:
    """What :func:`write_summary` wrote; ``UsageError`` if it is damaged."""
    path = folder / CORPUS_FILE
    found = read_json(path, "the corpus")
    if not _is_whole(found):
        raise UsageError(
            f"{foreign(path)} is not what gpt prepare wrote; delete the folder, and prepare the "
            "text again"
        )
    for split in SPLITS:
        for part in found["shards"][split]:
            if Path(part["name"]).name != part["name"]:
                raise UsageError(
                    f"{foreign(path)} names the shard {quoted(part['name'])}; prepare the text "
                    "again"
                )
    whole: Summary = found
    return whole


def _is_whole(found: Any) -> bool:
    """Whether ``found`` has what is read of a summary."""
    if not isinstance(found, dict) or not isinstance(found.get("work"), dict):
        return False
    counts, shards = found.get("counts"), found.get("shards")
    return (
        isinstance(counts, dict)
        and {"documents", "bytes", "tokens"} <= counts.keys()
        and all(isinstance(n, int) for n in counts.values())
        and isinstance(shards, dict)
        and all(isinstance(shards.get(split), list) for split in SPLITS)
        and all(_is_part(part) for split in SPLITS for part in shards[split])
    )


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("name"), str)
        and isinstance(part.get("tokens"), int)
    )
