"""From documents to token shards, which are cached under the fingerprints of text and tokenizer.

The end of the text is held out for validation. The boundary depends only on the text, so it is the
same for all tokenizers. Each document ends with the tokenizer's end-of-text.
"""

import contextlib
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gpt.config import DataConfig, UsageError, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import TextWindows, Windows
from gpt.data.corpus import PREPARED_FILES, Corpus, Say, Survey, open_corpus
from gpt.data.piped import keep
from gpt.data.reading import Reading
from gpt.data.shards import Shard, ShardWriter, read_shard
from gpt.data.tokenizer import Ids, Tokenizer, encoder
from gpt.data.tokenizer_training import recipe, tokenizer_of_text
from gpt.files import new_folder

Split = Literal["train", "validation"]
Progress = Callable[[float], None]
"""Receives the fraction of the work that is done, from 0 to 1."""


@dataclass(frozen=True)
class Prepared:
    """A text as tokens, ready to train on."""

    tokenizer: Tokenizer
    train: Shard
    validation: Shard

    def windows(self, split: Split, context_length: int) -> Windows:
        """The text of a split as windows; ``UsageError`` if it has less than one."""
        return TextWindows(getattr(self, split), context_length)


def prepare(
    config: DataConfig,
    cache_dir: Path,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress = lambda fraction: None,
    say: Say = lambda text: None,
) -> Prepared:
    """The shards of ``config.source`` in ``cache_dir``; they are written if they are not there yet.

    ``tokenizer`` replaces the one that ``config.tokenizer`` names, and is needed if that is a file
    or an encoding of tiktoken. ``say`` is told what the source
    means if that may be unexpected. ``UsageError`` for a text that cannot be read, a folder that
    cannot be written, and damaged shards.
    """
    config = keep(config, cache_dir)
    corpus = open_corpus(config.source, Reading.of(config), say=say)
    kind = tokenizer.kind if tokenizer else config.tokenizer
    survey = corpus.survey(characters=kind == "char" and tokenizer is None)
    if survey.length == 0:
        raise UsageError(f"data.source is {quoted(config.source)}, which has no text")
    made = kind if tokenizer else recipe(config)
    key = hashlib.sha256(survey.fingerprint + f"{made} {config.validation_fraction!r}".encode())
    if tokenizer:
        key.update(tokenizers.fingerprint(tokenizer))
    folder = cache_dir / f"{config.name[:40]}-{kind}-{key.hexdigest()[:12]}"
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)  # a part of it was deleted
        try:
            with new_folder(folder) as work:
                tokenizer = tokenizer or tokenizer_of_text(
                    config,
                    corpus.documents(),
                    length=survey.length,
                    characters=survey.characters,
                    say=say,
                )
                _write(config, corpus, survey, work, tokenizer, progress)
        except UsageError:
            if not _is_whole(folder):  # else another run has prepared it meanwhile
                raise
    return read_prepared(folder)


def _is_whole(folder: Path) -> bool:
    return all((folder / name).exists() for name in PREPARED_FILES)


def read_prepared(folder: Path) -> Prepared:
    """Read what :func:`prepare` wrote into ``folder``."""
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    fingerprint = tokenizers.fingerprint(tokenizer)
    train, validation = (
        read_shard(folder / f"{split}.bin", tokenizer=fingerprint, vocab_size=tokenizer.vocab_size)
        for split in ("train", "validation")
    )
    return Prepared(tokenizer, train, validation)


def _write(
    config: DataConfig,
    corpus: Corpus,
    survey: Survey,
    folder: Path,
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    (folder / "tokenizer.json").write_text(tokenizers.to_json(tokenizer), encoding="utf-8")
    boundary = round(survey.length * (1 - config.validation_fraction))
    done = 0
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    folder / f"{split}.bin",
                    vocab_size=tokenizer.vocab_size,
                    tokenizer=tokenizers.fingerprint(tokenizer),
                    corpus=survey.fingerprint,
                )
            )
            for split in ("train", "validation")
        }
        for split, piece, ids in _encoded(tokenizer, _pieces(corpus, boundary)):
            writers[split].write(ids)
            done += len(piece)
            progress(done / survey.length)


def _pieces(corpus: Corpus, boundary: int) -> Iterator[tuple[Split, str]]:
    """The pieces of each split; they are cut at the character ``boundary``. An empty piece ends a
    document.
    """
    position = 0
    for document in corpus.documents():
        start = position
        for piece in document:
            cut = boundary - position
            position += len(piece)
            if piece[: max(cut, 0)]:
                yield "train", piece[:cut]
            if piece[max(cut, 0) :]:
                yield "validation", piece[max(cut, 0) :]
        if position > start:
            yield "train" if position <= boundary else "validation", ""


def _encoded(
    tokenizer: Tokenizer, pieces: Iterator[tuple[Split, str]]
) -> Iterator[tuple[Split, str, Ids]]:
    """Each piece with its ids, in order. Threads encode several pieces at once (tiktoken releases
    Python's lock). A document begins with the tokenizer's first tokens.
    """
    end_of_text = np.array([tokenizer.end_of_text], np.uint32)
    begins = True
    workers = os.cpu_count() or 1
    waiting: deque[tuple[Split, str, Future[Ids]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for split, piece in pieces:
            encode = encoder(tokenizer, begins=begins) if piece else lambda _: end_of_text
            begins = not piece
            waiting.append((split, piece, pool.submit(encode, piece)))
            if len(waiting) > 2 * workers:
                split, piece, ids = waiting.popleft()
                yield split, piece, ids.result()
        for split, piece, ids in waiting:
            yield split, piece, ids.result()
