"""Records with prompts, divided into training and held-out ones by the hash of their prompts.

A record is an object with a "prompt" and other fields. Whether it is held out depends on its prompt
alone, so new records do not move the old ones, and no prompt is on both sides.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt.config import DataConfig, UsageError, foreign, quoted
from gpt.data.compression import Tap
from gpt.data.corpus import open_corpus
from gpt.data.reading import Reading
from gpt.data.records import Record, read_records
from gpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class RecordSet:
    """Records of one side."""

    items: list[Record]
    corpus: bytes
    """SHA-256 of the files of both sides."""

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Records:
    """Files of records, ready to train on."""

    tokenizer: Tokenizer
    train: RecordSet
    validation: RecordSet


def read_prompts(config: DataConfig, tokenizer: Tokenizer, fields: Sequence[str]) -> Records:
    """The records of ``config.source``, JSONL or Parquet.

    The ``fields`` of each, and its "prompt", are texts. ``UsageError`` names the place of a record
    that lacks one or has an empty one (a prompt may be empty), and a source that has not at least
    two different prompts.
    """
    reading = Reading.of(config)
    content = hashlib.sha256()
    items = []
    files = open_corpus(config.source, reading).files
    for where, item in read_records(files, reading, Tap(content.update)):
        for name in ("prompt", *fields):
            if name not in item:
                raise UsageError(f"{where} has no {quoted(name)}")
            if not isinstance(item[name], str):
                raise UsageError(
                    f"{where} has {quoted(item[name])} as its {quoted(name)}, which must be a "
                    "string"
                )
            if name != "prompt" and not item[name]:
                raise UsageError(f"{where} has an empty {quoted(name)}")
        items.append(item)
    shares = [_share(item["prompt"]) for item in items]
    ordered = sorted(set(shares))
    if len(ordered) < 2:
        raise UsageError(
            f"data.source is {foreign(config.source)}, which has records of {len(ordered)} "
            "different prompts, and needs at least 2: one to learn from, and one to hold out"
        )
    # at least one prompt on each side
    limit = max(config.validation_fraction, math.nextafter(ordered[0], 1))
    limit = min(limit, ordered[-1])
    sides: tuple[list[Record], list[Record]] = ([], [])
    for item, share in zip(items, shares, strict=True):
        sides[share < limit].append(item)
    corpus = content.digest()
    return Records(tokenizer, RecordSet(sides[0], corpus), RecordSet(sides[1], corpus))


def _share(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
