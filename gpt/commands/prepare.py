"""``gpt prepare``: texts to token shards, with a display of the progress."""

import sys
import time
from datetime import timedelta

import rich.progress as bars

from gpt.config import TOKENIZERS, PrepareConfig
from gpt.console import files_of, open_console, tell
from gpt.data.corpus import Corpus
from gpt.data.preparation import prepare_corpus
from gpt.data.progress import Progress
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import tokenizer_of_corpus
from gpt.interop.named_tokenizer import named_tokenizer

SECONDS = 10
"""Between two lines where the output is not a terminal."""


def prepare(config: PrepareConfig) -> int:
    """Run the command."""

    def tokenizer(corpus: Corpus) -> Tokenizer:
        name = config.data.tokenizer
        if name not in TOKENIZERS:
            return named_tokenizer(name)
        return tokenizer_of_corpus(config.data, corpus, say=tell)

    console = open_console(sys.stderr)
    columns = bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=20)
    bar = bars.Progress(*columns, console=console, transient=True)
    task = bar.add_task("reading", total=None)
    told = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal told
        if console.is_terminal:
            total = progress.total_bytes or None
            bar.update(task, description=line(progress), total=total, completed=progress.bytes)
        elif time.monotonic() - told > SECONDS:
            told = time.monotonic()
            tell(line(progress))

    if console.is_terminal:
        bar.start()
    try:
        summary = prepare_corpus(config, tokenizer, show=show, say=tell)
    finally:
        if console.is_terminal:
            bar.stop()
    print_summary(config, summary)
    return 0


def line(progress: Progress) -> str:
    """How far it is, how fast, and how long it still takes as far as that is known."""
    parts = [
        f"{progress.tokens:,} tokens",
        f"{progress.bytes_per_second / 1e6:.1f} MB/s",
        f"{progress.tokens_per_second:,.0f} tokens/s",
    ]
    if progress.total_bytes:
        parts.insert(0, f"{progress.share:.0%}")
    if (left := progress.seconds_left) is not None:
        parts.append(f"{timedelta(seconds=left)} left")
    return ", ".join(parts)


def print_summary(config: PrepareConfig, summary: dict[str, object]) -> None:
    """What was written, in a few lines."""
    counts, shards = summary["counts"], summary["shards"]
    assert isinstance(counts, dict)
    assert isinstance(shards, dict)
    parts = []
    for split, word in (("train", "training"), ("validation", "validation")):
        tokens = sum(shard["tokens"] for shard in shards[split])
        parts.append(f"{tokens:,} {word} tokens in {files_of(len(shards[split]))}")
    dropped = "".join(
        f", {counts[kind]:,} {kind} duplicates dropped"
        for kind in ("exact", "near")
        if kind in counts
    )
    open_console().print(
        f"{config.out}: {', '.join(parts)}; {counts['documents']:,} documents{dropped}, "
        f"{counts['bytes'] / max(1, counts['tokens']):.2f} bytes a token"
    )
