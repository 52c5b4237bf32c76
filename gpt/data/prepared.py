"""A text as tokens, ready to train on: what a run, or ``gpt prepare``, has written."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from gpt.config import UsageError, WindowKind, foreign
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import Boundary, TextWindows, Windows
from gpt.data.corpus import CORPUS_FILE
from gpt.data.document_windows import DocumentWindows
from gpt.data.pieces import SPLITS, Split
from gpt.data.shards import Shard, Shards, read_shard
from gpt.data.summary import read_summary
from gpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A text as tokens, ready to train on."""

    tokenizer: Tokenizer
    train: Shard | Shards
    validation: Shard | Shards
    kind: WindowKind = "crossing"
    """How the text is cut into windows."""

    def windows(self, split: Split, context_length: int) -> Windows:
        """The text of a split as windows; ``UsageError`` if it has less than one."""
        shard: Shard | Shards = getattr(self, split)
        boundary = Boundary.of(self.tokenizer)
        if self.kind == "best_fit":
            return DocumentWindows(shard, context_length, boundary)
        return TextWindows(
            shard, context_length, boundary=boundary if self.kind == "packed" else None
        )


def read_prepared(folder: Path) -> Prepared:
    """Read what :func:`prepare` wrote into ``folder``."""
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    fingerprint = tokenizers.fingerprint(tokenizer)
    train, validation = (
        read_shard(folder / f"{split}.bin", tokenizer=fingerprint, vocab_size=tokenizer.vocab_size)
        for split in ("train", "validation")
    )
    return Prepared(tokenizer, train, validation)


def read_corpus(folder: Path, tokenizer: Tokenizer | None = None) -> Prepared:
    """What ``gpt prepare`` wrote into ``folder``. The shards are read once and checked.

    ``UsageError`` if it is incomplete, or was made with another tokenizer than ``tokenizer``.
    """
    folder = folder.expanduser()
    summary = read_summary(folder)
    own = tokenizers.load(folder / "tokenizer.json")
    if tokenizer is not None and tokenizers.fingerprint(own) != tokenizers.fingerprint(tokenizer):
        raise UsageError(
            f"{foreign(folder)} was prepared with another tokenizer than the model's; prepare the "
            "text again with --data.tokenizer, or without init"
        )
    corpus = hashlib.sha256(json.dumps(summary["shards"], sort_keys=True).encode()).digest()
    splits: list[Shards] = []
    for split in SPLITS:
        parts = []
        for listed in summary["shards"][split]:
            part = read_shard(
                folder / listed["name"],
                tokenizer=tokenizers.fingerprint(own),
                vocab_size=own.vocab_size,
            )
            if len(part) != listed["tokens"]:
                raise UsageError(
                    f"{foreign(part.path)} has {len(part):,} tokens, not {listed['tokens']:,}"
                )
            parts.append(part)
        splits.append(Shards(folder, parts, corpus))
    train, validation = splits
    return Prepared(own, train, validation)


def is_corpus(source: str) -> bool:
    """Whether ``source`` is a folder that ``gpt prepare`` wrote."""
    try:
        return (Path(source).expanduser() / CORPUS_FILE).is_file()
    except (OSError, RuntimeError, ValueError):
        return False
