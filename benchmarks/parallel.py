"""How far the gradients of a step are apart, whatever its split: ``python benchmarks/parallel.py``.

Runs ``tests/training/worker.py`` on one, two and four processes (gloo, on the CPU) and holds each
gradient against that of one process and one micro-batch of 8, in float32.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter's gradient."""
    names = expected.keys() - {"loss", "norm"}
    apart = ((found[n].double() - expected[n].double()).norm() / expected[n].norm() for n in names)
    return max(apart).item()


def main() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(
            "ALL:\nSpeak, speak.\n\nOne word, good citizens.\n" * 200
        )
        for n in (1, 2, 4):
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
            words += [str(ROOT / "tests" / "training" / "worker.py"), folder]
            subprocess.run([sys.executable, *words], env=environment, check=True)
            results[n] = torch.load(Path(folder) / f"{n}.pt", weights_only=False)
    table = Table(title="Largest relative difference of a gradient")
    for heading in ("processes", "strategy", "all targets", "masked unevenly"):
        table.add_column(heading)
    for n, found in results.items():
        for strategy in dict.fromkeys(key[0] for key in found if isinstance(key, tuple)):
            cells = []
            for kind in ("gradients", "masked"):
                expected = results[1]["single", kind, 8]
                splits = [v for k, v in found.items() if k[:2] == (strategy, kind)]
                cells.append(f"{max(worst(split, expected) for split in splits):.1e}")
            table.add_row(str(n), strategy, *cells)
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
