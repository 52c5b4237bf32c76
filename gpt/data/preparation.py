"""``gpt prepare``: documents of any number of sources to token shards, on all cores, in little
memory.

One thread reads, several encode (tiktoken releases Python's lock), and one writes in the order of
reading: the shards are the same for any number of workers. A journal says what is on the disk, so
that a preparation that was killed goes on from there, and its shards are the same to the byte.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.config import PrepareConfig, UsageError, foreign, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import CORPUS_FILE, Corpus, Say, joined, open_corpus
from gpt.data.duplicates import Seen
from gpt.data.encoding import Encoded, encoded
from gpt.data.journal import Journal
from gpt.data.pieces import SPLITS, Place, Split, Splitter, at_end, by_content, pieces
from gpt.data.piped import keep
from gpt.data.ray_pipeline import PARTS, prepare_on_ray
from gpt.data.reading import Reading
from gpt.data.shard_series import ShardSeries, write_block
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import recipe
from gpt.files import read_json, unwritable, write_atomically

JOURNAL, SEEN, PIPED = "journal.jsonl", "duplicates.sqlite", ".piped"
FEWEST_DOCUMENTS = 100
"""A corpus of fewer documents is held out at its end."""
BLOCKS_A_STEP = 32
"""Blocks of a million characters between two lines of the journal."""


@dataclass
class Progress:
    """What has been done so far, for a display."""

    total_bytes: int
    """Of all files; 0 if it is not known."""
    bytes: int = 0
    tokens: int = 0
    resumed: int = 0
    """Tokens that an earlier preparation wrote."""
    started: float = field(default_factory=time.monotonic)


def prepare_corpus(
    config: PrepareConfig,
    make_tokenizer: Callable[[Corpus], Tokenizer],
    *,
    show: Callable[[Progress], None] = lambda progress: None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Write the shards of ``config.sources`` into ``config.out``, and return what its
    ``corpus.json`` says. ``UsageError`` for a source that cannot be read, a folder that cannot be
    written, and a folder with other data.
    """
    out = config.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise unwritable(out, error) from None
    try:
        with FileLock(out / ".lock", timeout=0):
            corpus, sizes = _opened(config, say)
            found = _work(config, corpus, sizes)
            if (out / CORPUS_FILE).exists():
                return _finished(out, found, say)
            others = [p.name for p in out.iterdir() if not p.name.startswith(".")]
            if others and not (out / JOURNAL).exists():
                raise UsageError(
                    f"{foreign(out)} has other files ({foreign(others[0])}); name a new folder"
                )
            if config.engine == "ray":
                return _on_ray(config, corpus, found, make_tokenizer)
            made = out / "tokenizer.json"  # by the preparation that is continued
            tokenizer = tokenizers.load(made) if made.exists() else make_tokenizer(corpus)
            preparation = _Preparation(config, corpus, found, tokenizer, say)
            return preparation.run(Progress(sum(sizes)), show)
    except Timeout:
        raise UsageError(f"{foreign(out)} is being prepared by another process") from None
    except OSError as error:
        raise unwritable(out, error) from None


def _on_ray(
    config: PrepareConfig,
    corpus: Corpus,
    work: dict[str, Any],
    make_tokenizer: Callable[[Corpus], Tokenizer],
) -> dict[str, Any]:
    if config.duplicates != "keep":
        raise UsageError(
            f"duplicates is {config.duplicates}, and the workers of engine ray do not know each "
            "other's documents; use engine local, or keep"
        )
    if config.validation == "end":
        raise UsageError(
            "validation is end, and the workers of engine ray do not know where the text ends; "
            "use engine local, or documents"
        )
    tokenizer = make_tokenizer(corpus)
    work = work | {"tokenizer": tokenizers.fingerprint(tokenizer).hex()}
    counts, shards = prepare_on_ray(
        corpus,
        tokenizer,
        config.out,
        fraction=config.data.validation_fraction,
        shard_tokens=config.shard_tokens,
        made=_fingerprint(work),
    )
    summary = _summary(config, tokenizer, work, counts, shards)
    write_summary(config.out, summary)
    shutil.rmtree(config.out / PARTS)
    return summary


def _fingerprint(work: dict[str, Any]) -> bytes:
    """Of what decides the shards: not of when the files were written."""
    lasting = {name: value for name, value in work.items() if name != "contents"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).digest()


def _summary(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    work: dict[str, Any],
    counts: Mapping[str, int],
    shards: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """The content of ``corpus.json``."""
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
        "work": work,
    }


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Write ``corpus.json``, which makes the folder complete."""
    write_atomically(out / CORPUS_FILE, json.dumps(summary, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(out / PIPED, ignore_errors=True)


def _opened(config: PrepareConfig, say: Say) -> tuple[Corpus, list[int]]:
    """All sources as one corpus, and the sizes of its files."""
    corpora = []
    for source in config.sources or (config.data.source,):
        one = dataclasses.replace(config.data, source=source)
        one = keep(one, config.out / PIPED) if one.descriptor is not None else one
        corpora.append(open_corpus(one.source, Reading.of(one), field="a source", say=say))
    corpus = joined(corpora)
    for folder in filter(None, (each.folder for each in corpora)):
        if config.out.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"out is {foreign(config.out)}, which is inside the source {foreign(folder)}; name "
                "a folder elsewhere"
            )
    sizes = [path.stat().st_size if path.is_file() else 0 for path in corpus.files]
    return corpus, sizes


def _work(config: PrepareConfig, corpus: Corpus, sizes: list[int]) -> dict[str, Any]:
    """What decides the shards, apart from the tokenizer, as the journal's first line."""
    digest, times = hashlib.sha256(), hashlib.sha256()
    for path, size in zip(corpus.files, sizes, strict=True):
        digest.update(f"{path} {size}\n".encode(errors="surrogatepass"))
        times.update(f"{path.stat().st_mtime_ns if size else 0}\n".encode())
    named = Path(config.data.tokenizer).expanduser()
    if named.is_file():
        times.update(named.read_bytes())
    return {
        "files": digest.hexdigest(),
        "contents": times.hexdigest(),
        "reading": corpus.name,
        "tokenizer setting": recipe(config.data),
        "duplicates": config.duplicates,
        "shard_tokens": config.shard_tokens,
        "validation": config.validation,
        "validation_fraction": config.data.validation_fraction,
    }


def _finished(out: Path, work: dict[str, Any], say: Say) -> dict[str, Any]:
    summary = read_json(out / CORPUS_FILE, "the corpus")
    if not _is_summary(summary):
        raise UsageError(
            f"{foreign(out / CORPUS_FILE)} is not what gpt prepare wrote; delete the folder, or "
            "name a new one"
        )
    if {k: summary["work"].get(k) for k in work} != work:
        raise UsageError(f"{foreign(out)} has other prepared data; name a new folder")
    say(f"{foreign(out)} is prepared already")
    checked: dict[str, Any] = summary
    return checked


def _is_summary(found: Any) -> bool:
    """Whether ``found`` has what :func:`_summary` makes, as far as it is printed."""
    if not isinstance(found, dict) or not isinstance(found.get("work"), dict):
        return False
    counts, shards = found.get("counts"), found.get("shards")
    return (
        isinstance(counts, dict)
        and {"documents", "bytes", "tokens"} <= counts.keys()
        and all(isinstance(n, int) for n in counts.values())
        and isinstance(shards, dict)
        and all(isinstance(shards.get(split), list) for split in SPLITS)
        and all(
            isinstance(part, dict) and isinstance(part.get("tokens"), int)
            for split in SPLITS
            for part in shards[split]
        )
    )


class _Preparation:
    """One preparation, new or continued."""

    def __init__(
        self,
        config: PrepareConfig,
        corpus: Corpus,
        work: dict[str, Any],
        tokenizer: Tokenizer,
        say: Say,
    ) -> None:
        self.config, self.corpus, self.out = config, corpus, config.out
        self.tokenizer = tokenizer
        fingerprint = tokenizers.fingerprint(tokenizer)
        self.work = work | {"tokenizer": fingerprint.hex()}
        self.splitter = self._splitter()
        self.journal = Journal(self.out / JOURNAL, self.work)
        last = self.journal.last or {}
        self.place = Place(*last.get("place", ()))
        self.steps: int = last.get("step", 0)
        self.counts: Counter[str] = Counter(last.get("counts", {}))
        self.drops = False  # whether the pieces of the current document are left out
        write_atomically(self.out / "tokenizer.json", tokenizers.to_json(tokenizer))
        made = _fingerprint(self.work)
        self.series: dict[Split, ShardSeries] = {}
        self.seen: Seen | None = None
        try:
            for split in SPLITS:
                self.series[split] = ShardSeries(
                    self.out,
                    split,
                    vocab_size=tokenizer.vocab_size,
                    tokenizer=fingerprint,
                    corpus=made,
                    shard_tokens=config.shard_tokens,
                    state=last.get(split, {}),
                )
            if config.duplicates != "keep":
                self.seen = Seen(self.out / SEEN)
                self.seen.back_to(self.steps)
        except BaseException:
            with self.journal:
                self._close()
            raise
        if last:
            say(f"going on after {self.counts['tokens']:,} tokens")

    def _splitter(self) -> Splitter:
        kind, fraction = self.config.validation, self.config.data.validation_fraction
        if kind == "auto":
            kind = "documents" if _has_many(self.corpus) else "end"
        if kind == "documents":
            return by_content(fraction)
        boundary = round(self.corpus.survey().length * (1 - fraction))
        return at_end(boundary, whole_words=self.tokenizer.kind == "words")

    def run(self, progress: Progress, show: Callable[[Progress], None]) -> dict[str, Any]:
        """Prepare what is left, and return the summary."""
        progress.resumed = progress.tokens = self.counts["tokens"]
        progress.bytes = sum(
            path.stat().st_size for path in self.corpus.files[: self.place.file] if path.is_file()
        )

        def tap(block: bytes) -> None:
            progress.bytes += len(block)

        with self.journal, contextlib.ExitStack() as stack:
            stack.callback(self._close)
            read = pieces(self.corpus, self.splitter, start=self.place, tap=tap)
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
                show(progress)
            shards = {split: series.close() for split, series in self.series.items()}
        return self._finish(shards)

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

    def _finish(self, shards: dict[Split, list[dict[str, Any]]]) -> dict[str, Any]:
        named = {str(split): files for split, files in shards.items()}
        summary = _summary(self.config, self.tokenizer, self.work, self.counts, named)
        write_summary(self.out, summary)
        for path in (JOURNAL, SEEN, f"{SEEN}-wal", f"{SEEN}-shm"):
            (self.out / path).unlink(missing_ok=True)
        return summary


def _has_many(corpus: Corpus) -> bool:
    """Whether the corpus has :data:`FEWEST_DOCUMENTS`."""
    for number, document in enumerate(corpus.documents(), 1):
        for _ in document:
            pass
        if number == FEWEST_DOCUMENTS:
            return True
    return False
