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

from gpt.config import DataConfig, TooLong, UsageError, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import Windows
from gpt.data.chat_templates import DEFAULT, PLAIN, PLAIN_LETTERS, ChatTemplates
from gpt.data.compression import Tap
from gpt.data.corpus import open_corpus
from gpt.data.example_windows import ExampleWindows
from gpt.data.examples import Example, Examples, load_examples, save_examples
from gpt.data.pieces import Split
from gpt.data.piped import keep
from gpt.data.prepared import is_corpus
from gpt.data.reading import Reading
from gpt.data.records import Record, read_records
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import Tokenizer, end_text
from gpt.data.tokenizer_training import tokenizer_of_text
from gpt.files import new_folder

SPLITS = ("train", "validation")


Encode = Callable[[Record, str], Example]
"""A record, and its place for messages, to its example."""
Encoder = Callable[[Tokenizer], Encode]


@dataclass(frozen=True)
class Instructions:
    """Records as examples, ready to train on."""

    tokenizer: Tokenizer
    train: Examples
    validation: Examples
    too_long: TooLong

    def windows(self, split: Split, context_length: int) -> Windows:
        """The examples of a split, packed into windows."""
        return ExampleWindows(getattr(self, split), context_length, too_long=self.too_long)


def is_instructions(config: DataConfig) -> bool:
    """Whether ``config.source`` has records with answers: its first record says so."""
    if config.descriptor is not None or config.records != "auto":
        return config.records == "instructions"
    if is_corpus(config.source) or is_token_files(config.source):
        return False
    reading = Reading.of(config)
    files = open_corpus(config.source, reading).files
    if not all(path.is_file() and reading.format_of(path) != "text" for path in files):
        return False
    _, first = next(read_records(files, reading), ("", {}))
    return "messages" in first or {"prompt", "completion"} <= set(first)


def prepare_instructions(
    config: DataConfig,
    cache_dir: Path,
    encoder: Encoder,
    *,
    tokenizer: Tokenizer | None = None,
) -> Instructions:
    """The examples of ``config.source``, from ``cache_dir`` if they are there.

    Without a ``tokenizer``, the one that ``config.tokenizer`` names is made. A tokenizer without a
    chat template gets the plain one if there are conversations. ``UsageError`` for a record that
    cannot be encoded, with its place.
    """
    config = keep(config, cache_dir)
    reading = Reading.of(config)
    digest = hashlib.sha256()
    files = open_corpus(config.source, reading).files
    records = list(read_records(files, reading, Tap(digest.update)))
    if len(records) < 2:
        raise UsageError(
            f"data.source is {quoted(config.source)}, which has {len(records)} records, and needs "
            "2: one is held out"
        )
    if tokenizer is None:
        texts = [text for _, record in records for text in _texts(record)]
        tokenizer = tokenizer_of_text(
            config,
            [texts, [PLAIN_LETTERS]],
            length=sum(map(len, texts)),
            characters="".join({*"".join(texts), *PLAIN_LETTERS}),
        )
    if tokenizer.chat is None and any("messages" in record for _, record in records):
        tokenizer.chat = ChatTemplates({DEFAULT: PLAIN}, {"eos_token": end_text(tokenizer)})
    key = hashlib.sha256(digest.digest() + f"{reading} {config.validation_fraction!r}".encode())
    key.update(tokenizers.to_json(tokenizer).encode())  # with its chat template
    folder = cache_dir / f"{config.name[:40]}-instructions-{key.hexdigest()[:12]}"
    if not folder.exists():
        is_held_out = held_out([record for _, record in records], config.validation_fraction)
        encode = encoder(tokenizer)
        parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
        for (where, record), is_out in zip(records, is_held_out, strict=True):
            parts[SPLITS[is_out]].append(encode(record, where))
        with new_folder(folder) as work:
            for name, examples in parts.items():
                (work / name).mkdir()
                save_examples(work / name, examples)
    train, validation = (load_examples(folder / name, digest.digest()) for name in SPLITS)
    return Instructions(tokenizer, train, validation, config.too_long)


def _texts(value: Any) -> list[str]:
    """All texts in a record."""
    match value:
        case str():
            return [value]
        case Mapping():
            return [text for item in value.values() for text in _texts(item)]
        case list():
            return [text for item in value for text in _texts(item)]
    return []


def held_out(records: Sequence[Record], fraction: float) -> list[bool]:
    """Which records are held out: those whose questions have hashes below ``fraction``, or, if
    there is none, the one with the lowest hash.
    """
    hashes = [_hash(question_of(record)) for record in records]
    limit = max(int(fraction * 2**64), min(hashes) + 1)
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


def _hash(value: Any) -> int:
    """A number below 2**64 that depends on the content of ``value`` alone."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
