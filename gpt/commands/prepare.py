"""``gpt prepare``: texts to token shards, with a display of the progress."""

import sys
import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt.config import TOKENIZERS, PrepareConfig
from gpt.console import open_console, tell
from gpt.data import preparation
from gpt.data.corpus import Corpus
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
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task("reading", total=None)
    told = time.monotonic()

    def show(progress: preparation.Progress) -> None:
        nonlocal told
        seconds = max(time.monotonic() - progress.started, 1e-3)
        text = (
            f"{progress.tokens:,} tokens, {progress.bytes / seconds / 1e6:.1f} MB/s, "
            f"{(progress.tokens - progress.resumed) / seconds:,.0f} tokens/s"
        )
        if console.is_terminal:
            total = progress.total_bytes or None
            bar.update(task, description=text, total=total, completed=progress.bytes)
        elif time.monotonic() - told > SECONDS:
            told = time.monotonic()
            share = f"{progress.bytes / progress.total_bytes:.0%}: " if progress.total_bytes else ""
            tell(share + text)

    if console.is_terminal:
        bar.start()
    try:
        summary = preparation.prepare_corpus(config, tokenizer, show=show, say=tell)
    finally:
        if console.is_terminal:
            bar.stop()
    print_summary(config, summary)
    return 0


def print_summary(config: PrepareConfig, summary: dict[str, object]) -> None:
    """What was written, in a few lines."""
    counts, shards = summary["counts"], summary["shards"]
    assert isinstance(counts, dict)
    assert isinstance(shards, dict)
    parts = []
    for split, word in (("train", "training"), ("validation", "validation")):
        tokens = sum(shard["tokens"] for shard in shards[split])
        parts.append(f"{tokens:,} {word} tokens in {len(shards[split])} files")
    dropped = "".join(
        f", {counts[kind]:,} {kind} duplicates dropped"
        for kind in ("exact", "near")
        if kind in counts
    )
    open_console().print(
        f"{config.out}: {', '.join(parts)}; {counts['documents']:,} documents{dropped}, "
        f"{counts['bytes'] / max(1, counts['tokens']):.2f} bytes a token"
    )
