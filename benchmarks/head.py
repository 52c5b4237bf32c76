"""The loss over a large vocabulary and its gradients: seconds and memory of a head by itself.

``python benchmarks/head.py [--rows 8192] [--vocabulary 50304] [--width 768] [--dtype bfloat16]``.
Forward and backward pass, from features and a float32 matrix to both gradients, each way in a
process of its own; the ways take turns. The memory is that of all tensors that are alive at the
peak, beyond features, matrix and their gradients.
"""

import argparse
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import describe, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gpt.config import ModelConfig
from gpt.device import choose_device, choose_precision, keep_freed_memory
from gpt.model.gpt import GPT
from gpt.training import loss
from gpt.training.footprint import Live

WAYS = {
    "naive": "cross_entropy of float32 logits",
    "whole": "this project, all logits at once",
    "chunks": "this project",
    "torch": "torch's linear_cross_entropy, in chunks",
}


def step_of(way: str, model: GPT, features: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """The summed loss of a way, to be called under autocast."""
    weight = model.head.weight
    if way == "naive":
        return lambda: F.cross_entropy((features @ weight.T).float(), targets, reduction="sum")
    if way == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda: F.linear_cross_entropy(
            features, weight.to(features.dtype), targets, reduction="sum", options=options
        )
    if way == "whole":
        loss.LOGITS = dict.fromkeys(loss.LOGITS, sys.maxsize)
    return functools.partial(loss.loss_of_features, model, features[None], targets=targets[None])


def measure(way: str, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each step, and the bytes of the peak."""
    keep_freed_memory()
    torch.manual_seed(0)
    device = choose_device(arguments.device)
    dtype = choose_precision(arguments.dtype, device)
    V, C, N = arguments.vocabulary, arguments.width, arguments.rows
    with torch.device(device):
        model = GPT(ModelConfig(vocab_size=V, context_length=8, n_layer=1, n_head=1, n_embd=C))
        features = torch.randn(N, C, dtype=dtype, requires_grad=True)
        targets = torch.randint(V, (N,))
    small = step_of(way, model, features[:2], targets[:2])

    def step(value: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total = value()
        total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(small)  # makes the gradients
    whole = step_of(way, model, features, targets)
    times = [seconds(functools.partial(step, whole)) for _ in range(arguments.steps + 1)]
    if device.type == "cuda":
        known = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(whole)
        return times[1:], torch.cuda.max_memory_allocated() - known
    with Live() as live:
        step(whole)
    return times[1:], live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2, help="of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        times, peak = measure(arguments.way, arguments)
        print("@", *times, peak)
        return
    ways = [way for way in WAYS if way != "torch" or hasattr(F, "linear_cross_entropy")]
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(arguments.turns):
        for way in ways:
            words = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(words, check=False, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{WAYS[way]}: {done.stderr}")
            *some, peaks[way] = map(float, done.stdout.rpartition("@")[2].split())
            times[way] += some
    console = Console(width=max(100, Console().width))
    console.print(describe(), highlight=False, soft_wrap=True)
    title = f"{arguments.rows:,} rows of {arguments.width}, {arguments.vocabulary:,} tokens"
    table = Table("", "ms", "of naive", "peak MB", "of naive", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    median = {way: statistics.median(some) for way, some in times.items()}
    for way in ways:
        table.add_row(
            WAYS[way],
            f"{1000 * median[way]:,.0f}",
            f"{median[way] / median['naive']:.2f} x",
            f"{peaks[way] / 1e6:,.0f}",
            f"{peaks[way] / peaks['naive']:.2f} x",
        )
    console.print(table)


if __name__ == "__main__":
    main()
