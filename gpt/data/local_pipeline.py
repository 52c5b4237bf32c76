"""``gpt prepare --engine local``: documents to token shards on the cores of this machine.

One thread reads, several encode (tiktoken releases Python's lock), and one writes in the order of
reading: the shards are the same for any number of workers. A journal says what is on the disk, so
that a preparation that was killed goes on from there, and its shards are the same to the byte.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt.config import PrepareConfig
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import Corpus
from gpt.data.duplicates import Seen
from gpt.data.encoding import Encoded, encoded
from gpt.data.journal import Journal
from gpt.data.pieces import SPLITS, Place, Split, Splitter, at_end, by_content, pieces
from gpt.data.progress import Progress
from gpt.data.shard_series import ShardSeries, write_block
from gpt.data.tokenizer import Tokenizer

SEEN = "duplicates.sqlite"
FEWEST_DOCUMENTS = 100
"""A corpus of fewer documents is held out at its end."""
BLOCKS_A_STEP = 32
"""Blocks of a million characters between two lines of the journal."""


class LocalPipeline:
    """One preparation, new, or continued after the last step of ``journal``."""

    def __init__(
        self,
        config: PrepareConfig,
        corpus: Corpus,
        tokenizer: Tokenizer,
        journal: Journal,
        made: bytes,
    ) -> None:
        """``made`` is the fingerprint of the work, for the shards' headers."""
        self.config, self.corpus, self.tokenizer = config, corpus, tokenizer
        self.journal = journal
        last = journal.last or {}
        self.place = Place(*last.get("place", ()))
        self.steps: int = last.get("step", 0)
        self.counts: Counter[str] = Counter(last.get("counts", {}))
        self.splitter = self._splitter()
        self.drops = False  # whether the pieces of the current document are left out
        fingerprint = tokenizers.fingerprint(tokenizer)
        self.series: dict[Split, ShardSeries] = {}
        self.seen: Seen | None = None
        try:
            for split in SPLITS:
                self.series[split] = ShardSeries(
                    config.out,
                    split,
                    vocab_size=tokenizer.vocab_size,
                    tokenizer=fingerprint,
                    corpus=made,
                    shard_tokens=config.shard_tokens,
                    state=last.get(split, {}),
                )
            if config.duplicates != "keep":
                self.seen = Seen(config.out / SEEN)
                self.seen.back_to(self.steps)
        except BaseException:
            self._close()
            raise

    def _splitter(self) -> Splitter:
        kind, fraction = self.config.validation, self.config.data.validation_fraction
        if kind == "auto":
            kind = "documents" if _has_many(self.corpus) else "end"
        if kind == "documents":
            return by_content(fraction)
        boundary = round(self.corpus.survey().length * (1 - fraction))
        return at_end(boundary, whole_words=self.tokenizer.kind == "words")

    def run(
        self, progress: Progress, show: Callable[[Progress], None]
    ) -> tuple[Counter[str], dict[str, list[dict[str, Any]]]]:
        """Prepare what is left, and return the counts and the shards of each split."""
        progress.resume(progress.before[self.place.file], self.counts["tokens"])
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            read = pieces(self.corpus, self.splitter, start=self.place, tap=progress.tap)
            blocks = encoded(
                read,
                self.tokenizer,
                duplicates=self.config.duplicates,
                workers=self.config.workers,
            )
            for number, block in enumerate(blocks, 1):
                write_block([each for each in block if self._keeps(each)], self.series, self.counts)
                place = block[-1].piece.after
                assert place is not None
                self.place = place
                if number % BLOCKS_A_STEP == 0:
                    self._step()
                progress.tokens = self.counts["tokens"]
                progress.bytes = max(progress.bytes, progress.before[place.file])
                show(progress)
            return self.counts, {split: series.close() for split, series in self.series.items()}

    def _close(self) -> None:
        for series in self.series.values():
            series.abandon()
        if self.seen is not None:
            self.seen.close()

    def _keeps(self, each: Encoded) -> bool:
        """Whether the document of this piece is none that is left out as a duplicate."""
        if self.seen is None:
            return True
        if each.piece.begins:
            again = self.seen.add(each.keys, self.steps + 1)
            self.drops = bool(again)
            if again:
                self.counts.update({"documents": 1, again: 1})
        return not self.drops

    def _step(self) -> None:
        """Make sure that everything so far is on the disk, and write it into the journal."""
        self.steps += 1
        states = {str(split): series.flush() for split, series in self.series.items()}
        if self.seen is not None:
            self.seen.flush()
        self.journal.write(
            {"step": self.steps, "place": list(self.place), "counts": dict(self.counts), **states}
        )


def leftovers(folder: Path) -> list[Path]:
    """The files that a finished preparation does not need."""
    return [folder / f"{SEEN}{ending}" for ending in ("", "-wal", "-shm")]


def _has_many(corpus: Corpus) -> bool:
    """Whether the corpus has :data:`FEWEST_DOCUMENTS`."""
    for number, document in enumerate(corpus.documents(), 1):
        for _ in document:
            pass
        if number == FEWEST_DOCUMENTS:
            return True
    return False
