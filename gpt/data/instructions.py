"""Instructions: records of prompts with answers, as examples in which only the answers count.

A record is held out for validation by the hash of what comes before its first answer: a question is
never on both sides, and it stays on its side when records are added. The examples are cached under
the fingerprints of records, tokenizer and chat template. They are held in memory while they are
prepared: 5 bytes a token.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.config import DataConfig, UsageError, foreign, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import open_corpus
from gpt.data.reading import Reading
from gpt.data.records import Record, read_records
from gpt.data.tokenizer import Ids, Tokenizer
from gpt.files import new_folder, unreadable

ARRAYS = ("ids", "counted", "ends")
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Example:
    """A sequence of ids ``[n]``, and which of them count in the loss as targets, ``[n]``."""

    ids: Ids
    counted: NDArray[np.bool_]


Encode = Callable[[Record, str], Example]
"""A record, and its place for messages, to its example."""


@dataclass(frozen=True)
class Examples:
    """Examples one after the other, memory-mapped. Example ``i`` is ``ids[ends[i - 1] : ends[i]]``;
    its first id comes after nothing.
    """

    path: Path
    ids: Ids
    counted: NDArray[np.bool_]
    ends: NDArray[np.int64]
    corpus: bytes
    """The fingerprint of the records."""

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, i: int) -> Example:
        """The example number ``i``."""
        part = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        return Example(self.ids[part], self.counted[part])

    def question(self, i: int) -> tuple[list[int], list[int]] | None:
        """The prompt of the last answer in example ``i``, and that answer; ``None`` for an example
        without a prompt, such as a text.
        """
        ids, counted = self.example(i).ids, self.example(i).counted
        uncounted = np.flatnonzero(~counted)
        end = len(ids) - int(counted[::-1].argmax())
        before = uncounted[uncounted < end]
        if not len(before):
            return None
        start = int(before[-1]) + 1
        return ids[:start].tolist(), ids[start:end].tolist()


def is_instructions(config: DataConfig) -> bool:
    """Whether ``config.source`` has records with answers: its first record says so."""
    if config.descriptor is not None or config.records != "auto":
        return config.records == "instructions"
    reading = Reading.of(config)
    files = open_corpus(config.source, reading).files
    if not all(path.is_file() and reading.format_of(path) != "text" for path in files):
        return False
    _, first = next(read_records(files, reading), ("", {}))
    return "messages" in first or {"prompt", "completion"} <= set(first)


def prepare_instructions(
    config: DataConfig, cache_dir: Path, tokenizer: Tokenizer, encode: Encode
) -> tuple[Examples, Examples]:
    """The training and the validation examples of ``config.source``, from ``cache_dir`` if they are
    there. ``UsageError`` for a record that cannot be encoded, with its place.
    """
    reading = Reading.of(config)
    digest = hashlib.sha256()
    files = open_corpus(config.source, reading).files
    records = list(read_records(files, reading, digest.update))
    if len(records) < 2:
        raise UsageError(
            f"data.source is {quoted(config.source)}, which has {len(records)} records, and needs "
            "2: one is held out"
        )
    key = hashlib.sha256(digest.digest() + f"{reading} {config.validation_fraction!r}".encode())
    key.update(tokenizers.to_json(tokenizer).encode())  # with its chat template
    folder = cache_dir / f"{config.name[:40]}-instructions-{key.hexdigest()[:12]}"
    if not folder.exists():
        is_held_out = held_out([record for _, record in records], config.validation_fraction)
        parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
        for (where, record), is_out in zip(records, is_held_out, strict=True):
            parts[SPLITS[is_out]].append(encode(record, where))
        with new_folder(folder) as work:
            for name, examples in parts.items():
                (work / name).mkdir()
                _save(work / name, examples)
    train, validation = (_load(folder / name, digest.digest()) for name in SPLITS)
    return train, validation


def held_out(records: Sequence[Record], fraction: float) -> list[bool]:
    """Which records are held out: those whose questions have hashes below ``fraction``, or, if
    there is none, the one with the lowest hash.
    """
    hashes = [_hash(question_of(record)) for record in records]
    limit = fraction if min(hashes) < fraction else min(hashes) + 2**-60
    chosen = [value < limit for value in hashes]
    if all(chosen):
        raise UsageError(
            f"data.validation_fraction is {fraction}, and all {len(records)} records would be held "
            "out; records with one question are on one side"
        )
    return chosen


def question_of(record: Record) -> Any:
    """What comes before a record's first answer; the whole of a record without one."""
    if isinstance(messages := record.get("messages"), list):
        roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
        return messages[: roles.index("assistant")] if "assistant" in roles else messages
    return record.get("prompt", record)


def _hash(value: Any) -> float:
    """A number from 0 to 1 that depends on the content of ``value`` alone."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def _save(folder: Path, examples: Sequence[Example]) -> None:
    np.save(folder / "ids.npy", np.concatenate([e.ids for e in examples]))
    np.save(folder / "counted.npy", np.concatenate([e.counted for e in examples]))
    np.save(folder / "ends.npy", np.cumsum([len(e.ids) for e in examples]))


def _load(folder: Path, corpus: bytes) -> Examples:
    arrays = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise unreadable(path, "the examples", error) from None
        except ValueError as error:
            raise UsageError(
                f"{foreign(path)} is damaged ({foreign(error)}); delete its folder"
            ) from None
    ids, counted, ends = (arrays[name] for name in ARRAYS)
    if not len(ids) == len(counted) == ends[-1] or (np.diff(ends, prepend=0) <= 0).any():
        raise UsageError(f"{foreign(folder)} is damaged: its arrays differ; delete its folder")
    return Examples(folder, ids, counted, ends, corpus)
