"""``gpt prepare``: documents of any number of sources to a folder of token shards.

The folder is new, or has an unfinished preparation of the same work, which is continued, or a
finished one, which is left as it is. One of two engines fills it: the cores of this machine, or a
Ray cluster. The journal in the folder says what the work is, until ``corpus.json`` does.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.config import PrepareConfig, UsageError, foreign
from gpt.data import local_pipeline, ray_pipeline
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import CORPUS_FILE, Corpus, Say
from gpt.data.journal import Journal
from gpt.data.local_pipeline import LocalPipeline
from gpt.data.progress import Progress
from gpt.data.ray_pipeline import prepare_on_ray
from gpt.data.sources import PIPED, open_sources, work_of
from gpt.data.summary import Summary, read_summary, summary_of, write_summary
from gpt.data.tokenizer import Tokenizer
from gpt.files import unwritable, write_atomically

JOURNAL, TOKENIZER = "journal.jsonl", "tokenizer.json"


def prepare_corpus(
    config: PrepareConfig,
    make_tokenizer: Callable[[Corpus], Tokenizer],
    *,
    show: Callable[[Progress], None] = lambda progress: None,
    say: Say = lambda text: None,
) -> Summary:
    """Write the shards of ``config.sources`` into ``config.out``, and return what its
    ``corpus.json`` says. ``UsageError`` for a source that cannot be read, a folder that cannot be
    written, and a folder with other data.
    """
    out = config.out
    if config.engine == "ray":
        ray_pipeline.check(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
        with FileLock(out / ".lock", timeout=0):
            corpus, sizes = open_sources(config, say)
            work = work_of(config, corpus, sizes)
            if (out / CORPUS_FILE).exists():
                summary = _finished(out, work, say)
            else:
                summary = _prepared(
                    config, corpus, work, Progress(sizes), make_tokenizer, show, say
                )
                write_summary(out, summary)
            _clear(out)
            return summary
    except Timeout:
        raise UsageError(f"{foreign(out)} is being prepared by another process") from None
    except OSError as error:
        raise unwritable(out, error) from None


def _finished(out: Path, work: dict[str, Any], say: Say) -> Summary:
    summary = read_summary(out)
    if {k: summary["work"].get(k) for k in work} != work:
        raise UsageError(f"{foreign(out)} has other prepared data; name a new folder")
    say(f"{foreign(out)} is prepared already")
    return summary


def _prepared(
    config: PrepareConfig,
    corpus: Corpus,
    work: dict[str, Any],
    progress: Progress,
    make_tokenizer: Callable[[Corpus], Tokenizer],
    show: Callable[[Progress], None],
    say: Say,
) -> Summary:
    """Begin or continue the work in ``config.out``, and return its summary."""
    out, made = config.out, config.out / TOKENIZER
    others = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if others and not (out / JOURNAL).exists():
        raise UsageError(
            f"{foreign(out)} has other files ({foreign(others[0])}); name a new folder"
        )
    tokenizer = tokenizers.load(made) if made.exists() else make_tokenizer(corpus)
    work = work | {"tokenizer": tokenizers.fingerprint(tokenizer).hex()}
    with Journal(out / JOURNAL, work) as journal:
        write_atomically(made, tokenizers.to_json(tokenizer))
        if config.engine == "ray":
            found = prepare_on_ray(
                config, corpus, progress=progress, show=show, made=_fingerprint(work)
            )
        else:
            pipeline = LocalPipeline(config, corpus, tokenizer, journal, _fingerprint(work))
            if journal.last:
                say(f"going on after {pipeline.counts['tokens']:,} tokens")
            found = pipeline.run(progress, show)
    return summary_of(config, tokenizer, work, *found)


def _fingerprint(work: dict[str, Any]) -> bytes:
    """Of what decides the shards: not of when the files were written."""
    lasting = {name: value for name, value in work.items() if name != "contents"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).digest()


def _clear(out: Path) -> None:
    """Delete what a finished preparation, or one that was killed, has left in its folder."""
    for path in (out / JOURNAL, *local_pipeline.leftovers(out), *out.glob(".*.new")):
        path.unlink(missing_ok=True)
    for folder in (PIPED, ray_pipeline.PARTS):
        shutil.rmtree(out / folder, ignore_errors=True)
