"""Peak resident memory: preparing a 1 GB text file, and loading a checkpoint for sampling.

``python benchmarks/memory.py [--gigabytes 1]``. Each figure is the peak of a process of its own, as
the operating system accounts for it, beside that of a bare interpreter with torch.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt import checkpoint as checkpoints
from gpt.checkpoint import State
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import open_corpus

BARE = "import torch"
PREPARE = """
from pathlib import Path
from gpt.config import DataConfig
from gpt.data.prepare import prepare
prepare(DataConfig(source={source!r}, tokenizer={tokenizer!r}), Path({cache!r}))
"""
LOAD = """
import torch, gpt
model, tokenizer = gpt.load({run!r}, dtype=torch.{dtype})
gpt.generate((model, tokenizer), "ROMEO:", max_new_tokens=4)
"""
# Linux's own account of this program alone: getrusage's would start at the parent's peak.
PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print(int(line.split()[1]) * 1024)
"""


def peak(code: str) -> int:
    """Bytes at the peak of a process that runs ``code``."""
    run = subprocess.run([sys.executable, "-c", code + PEAK], check=True, stdout=subprocess.PIPE)
    return int(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    arguments = parser.parse_args()
    table = Table(title="peak resident memory")
    for heading in ("", "MB", "MB above torch", "of the weights"):
        table.add_column(heading, justify="left" if not heading else "right")
    bare = peak(BARE)
    table.add_row("bare interpreter with torch", f"{bare / 1e6:,.0f}", "", "")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plays = "".join("".join(document) for document in open_corpus("shakespeare").documents())
        source = folder / "large.txt"
        with source.open("w", encoding="utf-8") as file:
            for _ in range(round(arguments.gigabytes * 1e9 / len(plays))):
                file.write(plays)
        size = source.stat().st_size
        for tokenizer in ("char", "byte", "gpt2"):
            code = PREPARE.format(source=str(source), tokenizer=tokenizer, cache=str(folder / "c"))
            bytes_ = peak(code)
            title = f"preparing {size / 1e9:.2f} GB, {tokenizer}"
            table.add_row(title, f"{bytes_ / 1e6:,.0f}", f"{(bytes_ - bare) / 1e6:,.0f}", "")
        source.unlink()

        run = folder / "run"
        run.mkdir()
        tokenizer = tokenizers.GPT2Tokenizer.released()
        (run / "tokenizer.json").write_text(tokenizers.to_json(tokenizer), encoding="utf-8")
        model = GPT(ModelConfig())
        weights = 4 * model.parameter_count()
        state = State(
            step=1,
            model=model.config,
            weights=dict(model.named_parameters()),
            training={},
            progress={},
            metrics={},
        )
        checkpoints.point(run, "best", checkpoints.save(run, state).name)
        del model
        for dtype in ("float32", "bfloat16"):
            bytes_ = peak(LOAD.format(run=str(run), dtype=dtype))
            above = bytes_ - bare
            table.add_row(
                f"loading GPT-2 124M, {dtype}",
                f"{bytes_ / 1e6:,.0f}",
                f"{above / 1e6:,.0f}",
                f"{above / weights:.2f} x",
            )
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
