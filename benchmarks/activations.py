"""Activation checkpointing: the memory that the blocks keep for a backward pass, and the time of a
forward and a backward pass.

``python benchmarks/activations.py [--n_layer 12] [--batch 4] [--context 512]``: GPT-2's width, in
bfloat16 where the machine has it. Each line is a process of its own. The peer is ``GPT2Model`` with
and without ``gradient_checkpointing_enable``.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from machine import describe, seconds
from rich.console import Console
from rich.table import Table

from gpt.config import ModelConfig
from gpt.device import choose_device, choose_precision
from gpt.model.gpt import GPT
from gpt.training.activations import checkpoint_activations
from gpt.training.precision import autocast

VARIANTS = ("none", "selective", "full", "hugging face", "hugging face, checkpointing")


def make(variant: str, n_layer: int, context: int, device: torch.device):
    """A function from tokens to what the head reads, in training mode."""
    if not variant.startswith("hugging face"):
        model = GPT(ModelConfig(n_layer=n_layer, context_length=context)).to(device).train()
        checkpoint_activations(model, variant)
        return model.features
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_layer=n_layer, n_positions=context, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    model = GPT2Model(config).to(device).train()
    if variant.endswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lambda tokens: model(tokens, use_cache=False).last_hidden_state


def held(device: torch.device) -> float:
    """The memory in use now, in GB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def measure(variant: str, arguments: argparse.Namespace) -> str:
    """GB and seconds, in this process."""
    device = choose_device("auto")
    forward = make(variant, arguments.n_layer, arguments.context, device)
    precision = autocast(device, choose_precision("auto", device))
    tokens = torch.randint(50257, (arguments.batch, arguments.context), device=device)
    memory = []

    def step() -> None:
        before = held(device)
        with precision:
            x = forward(tokens)
        memory.append(held(device) - before)
        x.sum().backward()

    times = [seconds(step) for _ in range(5)]
    return f"{max(memory)} {statistics.median(times)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("n_layer", 12), ("batch", 4), ("context", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variant", choices=VARIANTS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(measure(arguments.variant, arguments))
        return
    shape = f"{arguments.n_layer} layers of GPT-2's, {arguments.batch} x {arguments.context} tokens"
    table = Table(title=shape)
    for heading in ("", "GB", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for variant in VARIANTS:
        words = [sys.executable, __file__, "--variant", variant]
        for name in ("n_layer", "batch", "context"):
            words += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        memory, time = map(float, done.stdout.split())
        table.add_row(variant, f"{memory:.2f}", f"{time:.2f}")
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
