"""Figures of the data path: ``python benchmarks/data.py [batches]``.

``batches``: how many tokens a second a run can get as batches of windows of 1,024 tokens, in a
random order, from token shards that are in the system's cache; and the memory that stays mapped.
``documents``: what attention inside documents costs a training step, and saves.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from machine import seconds, show
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.data.batches import Boundary, TextWindows, Windows
from gpt.data.document_windows import DocumentWindows
from gpt.data.mixture import MixedOrder, MixedWindows
from gpt.data.order import Order
from gpt.data.shards import Shard, ShardWriter, read_shard

T, ROWS, STEPS, END = 1024, 32, 3000, 50_256


def random_shard(path: Path, n_tokens: int) -> Shard:
    """Random ids of GPT-2's vocabulary, in documents of 700 tokens on average."""
    generator = np.random.default_rng(0)
    with ShardWriter(path, vocab_size=END + 1, tokenizer=bytes(32), corpus=bytes(32)) as writer:
        for _ in range(0, n_tokens, 1 << 22):
            ids = generator.integers(0, END, 1 << 22, dtype=np.uint32)
            ids[generator.random(1 << 22) < 1 / 700] = END
            writer.write(ids)
    return read_shard(path, tokenizer=bytes(32), vocab_size=END + 1)


def mapped() -> float:
    """MB of files that are resident in this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1]) / 1024
    return 0.0


def batches() -> None:
    """The table of ``batches``."""
    table = Table(title=f"batches of {ROWS} x {T} tokens, {STEPS:,} of them")
    for heading in ("windows", "M tokens/s", "MB of files resident, at most"):
        table.add_column(heading, justify="left" if heading == "windows" else "right")
    with tempfile.TemporaryDirectory() as name:
        shard = random_shard(Path(name) / "train.bin", 200_000_000)
        other = random_shard(Path(name) / "other.bin", 20_000_000)
        inside = Boundary(END, begins=True)
        crossing = TextWindows(shard, T)
        kinds: dict[str, Windows] = {
            "crossing": crossing,
            "packed": TextWindows(shard, T, boundary=inside),
            "best_fit": DocumentWindows(shard, T, inside),
            "mixture of two": MixedWindows(
                ["one", "two"], [0.6, 0.4], [crossing, TextWindows(other, T)]
            ),
        }
        for kind, windows in kinds.items():
            order: Order | MixedOrder = Order(len(windows), batch_size=ROWS, seed=0)
            if isinstance(windows, MixedWindows):
                order = MixedOrder(windows, batch_size=ROWS, seed=0)
            most = 0.0
            start = time.perf_counter()
            for step in range(STEPS):
                windows.batch(order.step(step))
                if step % 500 == 499:
                    most = max(most, mapped())
            seconds = time.perf_counter() - start
            speed = STEPS * ROWS * T / seconds / 1e6
            table.add_row(kind, f"{speed:,.0f}", f"{most:,.0f}")
    show(table)


def documents() -> None:
    """The table of ``documents``."""
    table = Table(title="ms of a training step's forward and backward pass")
    for heading in ("", "crossing", "one by one", "with a mask"):
        table.add_column(heading, justify="right")
    for length, rows in ((256, 16), (1024, 4)):
        model = GPT(ModelConfig(vocab_size=512, context_length=length, n_layer=2, n_embd=384,
                                n_head=6)).train()  # fmt: skip
        tokens = torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(0))
        for size in (length // 2, length // 8, 16, 4):
            marks = (torch.arange(length) // size).expand(rows, length)
            figures = []
            for given, scores in ((None, 1), (marks, 1), (marks, 1 << 62)):

                def step(given: torch.Tensor | None = given, model: GPT = model) -> None:
                    model(tokens, documents=given).sum().backward()  # noqa: B023

                with mock.patch("gpt.model.documents.SCORES_A_DOCUMENT", scores):
                    figures.append(min(seconds(step) for _ in range(3)))
            name = f"{rows} x {length}, documents of {size}"
            table.add_row(name, *(f"{1000 * figure:,.0f}" for figure in figures))
    show(table)


PARTS: dict[str, Callable[[], None]] = {"batches": batches, "documents": documents}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
