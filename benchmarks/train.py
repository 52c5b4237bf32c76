"""Training speed of the 10.7M-parameter character model: 6 layers, 6 heads, 384 wide, T=256,
dropout 0.2.

``python benchmarks/train.py [--steps 3] [--dropout 0.2]``. One step is 64 windows, forward,
backward and optimizer. Beside the defaults stands each of them turned off in turn, and Hugging
Face's GPT-2 of the same shape in eager float32. nanoGPT's figure for this model on this kind of
machine is 1,545 tokens/s (eager float32). Each line is a process of its own: what the C library
keeps of freed memory is set once.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe, seconds
from rich.console import Console
from rich.table import Table

import gpt.model.attention
import gpt.model.dropout
from gpt.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, TrainingConfig
from gpt.data.prepare import prepare
from gpt.device import keep_freed_memory
from gpt.training.loop import Trainer

NANOGPT = 1545
VARIANTS = {
    "defaults": "this project, defaults on a CPU",
    "float32": "... in float32",
    "freed memory": "... without keeping freed memory",
    "fused attention": "... with the fused attention kernel",
    "torch dropout": "... with torch's dropout",
    "hugging face": "Hugging Face GPT-2, eager float32, AdamW",
}


def trainer(dropout: float, precision: str) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(DataConfig(), Path(folder))
        config = TrainConfig(
            run_dir=folder,
            model=ModelConfig(
                vocab_size=data.tokenizer.vocab_size,
                context_length=256,
                n_layer=6,
                n_head=6,
                n_embd=384,
                dropout=dropout,
            ),
            training=TrainingConfig(
                batch_tokens=64 * 256, micro_batch_size=16, precision=precision
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        )
        return Trainer(config, data)  # the shards stay mapped after the folder is gone


def hugging_face(dropout: float):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=72,
            n_positions=256,
            n_embd=384,
            n_layer=6,
            n_head=6,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = torch.randint(72, (4, 16, 256))

    def step() -> None:
        for tokens in batches:
            (model(tokens, labels=tokens).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(variant: str, *, dropout: float, steps: int) -> float:
    """Median tokens/s of a variant, in this process."""
    if variant != "freed memory":
        keep_freed_memory()
    if variant == "fused attention":
        gpt.model.attention._trains_faster_plainly = lambda q, p: False
    if variant == "torch dropout":
        gpt.model.attention.drop = torch.nn.functional.dropout
        gpt.model.dropout.dropout = torch.nn.functional.dropout
    if variant == "hugging face":
        step = hugging_face(dropout)
    else:
        step = trainer(dropout, "float32" if variant == "float32" else "auto").update
    step()
    return 64 * 256 / statistics.median(seconds(step) for _ in range(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(measure(arguments.variant, dropout=arguments.dropout, steps=arguments.steps))
        return
    table = Table(title=f"10.7M parameters, 64 x 256 tokens a step, dropout {arguments.dropout}")
    for heading in ("", "tokens/s", f"of nanoGPT's {NANOGPT:,}"):
        table.add_column(heading, justify="left" if not heading else "right")
    for variant, title in VARIANTS.items():
        words = [sys.executable, __file__, "--variant", variant, "--steps", str(arguments.steps)]
        words += ["--dropout", str(arguments.dropout)]
        rate = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        table.add_row(title, f"{rate:,.0f}", f"{rate / NANOGPT:.2f} x")
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
