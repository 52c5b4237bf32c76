"""What a checkpoint of GPT-2 124M with AdamW's state (1.5 GB) costs a run: the stall, the write.

``python benchmarks/checkpoint.py [--saves 3]``. Training stands still while the copy is taken; a
thread writes it, flushed and hashed. Beside it: the same written while the run waits, and
``torch.save`` of the same state into one file as nanoGPT does it (neither flushed nor hashed).
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from machine import describe, seconds
from rich.console import Console
from rich.table import Table

from gpt import checkpoint as checkpoints
from gpt.checkpoint import State
from gpt.config import CheckpointConfig, ModelConfig, OptimizerConfig
from gpt.device import keep_freed_memory
from gpt.model.gpt import GPT
from gpt.training.optimizer import make_optimizers
from gpt.training.parallel import World
from gpt.training.saving import Saver
from gpt.training.state import learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    model = GPT(ModelConfig())
    optimizers = make_optimizers(model, OptimizerConfig())
    tokens = torch.randint(50257, (1, 256))

    def step() -> None:
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()

    def state(number: int) -> State:
        return State(
            step=number,
            model=model.config,
            weights=dict(model.named_parameters()),
            training=learned(model, optimizers),
            progress={},
            metrics={},
        )

    def median(work, n: int = arguments.saves) -> float:
        return statistics.median(seconds(lambda i=i: work(i)) for i in range(n))

    table = Table(title="GPT-2 124M, 1.5 GB of weights and AdamW's state")
    for heading in ("", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Path(folder)
        with Saver(run, CheckpointConfig(keep=1), World()) as saver:
            saver.save(state(1), best=None)
            first = saver.stalls[0]
            saver._join()
            for number in range(2, 2 + arguments.saves):
                saver.save(state(number), best=None)
                saver._join()
            table.add_row("the run waits, at the first save", f"{first:.2f}")
            table.add_row("... at later saves", f"{statistics.median(saver.stalls[1:]):.2f}")
        table.add_row("a training step of 255 tokens", f"{median(lambda i: step()):.2f}")
        with Saver(run, CheckpointConfig(keep=1), World()) as saver:
            saver._copies = {}
            saver.save(state(100), best=None)
            beside = statistics.median(seconds(step) for _ in range(3))
            busy = saver._thread.is_alive()
        note = "" if busy else " (which was over before)"
        table.add_row(f"... beside the thread that writes{note}", f"{beside:.2f}")
        sync = median(lambda i: checkpoints.save(run, state(200 + i)))
        table.add_row("written while the run waits, flushed and hashed", f"{sync:.2f}")

        def plain(number: int) -> None:
            names = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizer": names}, run / "ckpt.pt")

        table.add_row(
            "torch.save while the run waits, neither flushed nor hashed", f"{median(plain):.2f}"
        )
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
