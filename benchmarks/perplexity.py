"""Perplexity of a text with a sliding window: this project beside the usual Hugging Face stride
loop.

``python benchmarks/perplexity.py [--stride 512] [--tokens 8192] [--dtypes float32,bfloat16]``.
GPT-2 124M with random weights, the same in both; each run is a process of its own that has loaded
the model and scored some text before, and is set up as its users have it. A window here predicts as
many tokens as it reads, in the loop one fewer: their windows end a token apart, and the losses
differ in the fifth digit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import describe, seconds
from rich.console import Console
from rich.table import Table

from gpt import GPT, ModelConfig, load
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.device import keep_freed_memory
from gpt.evaluation.perplexity import score_text
from gpt.interop.export import export_huggingface

NAMES = {"ours": "this project", "theirs": "Hugging Face, stride loop"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "DTYPE", "FOLDER"), help="in a process")
    arguments = parser.parse_args()
    ids = np.random.Generator(np.random.Philox(0)).integers(0, 50257, arguments.tokens)
    if arguments.one:
        who, dtype, folder = arguments.one
        score = {"ours": ours, "theirs": theirs}[who](folder, getattr(torch, dtype))
        score(ids[:1100], arguments.stride)
        loss = []
        taken = seconds(lambda: loss.append(score(ids, arguments.stride)))
        print(json.dumps([taken, *loss]))
        return
    title = f"{arguments.tokens:,} tokens, stride {arguments.stride}"
    table = Table(title=title)
    for heading in ("", "tokens/s", "nats/token", "this project's speed"):
        table.add_column(heading, justify="left" if not heading else "right")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        export_huggingface(GPT(ModelConfig()), GPT2Tokenizer.released(), Path(folder) / "model")
        for dtype in arguments.dtypes.split(","):
            runs: dict[str, list[list[float]]] = {who: [] for who in NAMES}
            for _ in range(arguments.runs):
                for who, measured in runs.items():
                    one = ["--one", who, dtype, str(Path(folder) / "model")]
                    words = [sys.executable, *sys.argv, *one]
                    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                    measured.append(json.loads(done.stdout))
            time = {who: statistics.median(t for t, _ in done) for who, done in runs.items()}
            for who, name in NAMES.items():
                ratio = f"{time[who] / time['ours']:.2f} x" if who != "ours" else ""
                rate = f"{arguments.tokens / time[who]:,.0f}"
                table.add_row(f"{dtype}: {name}", rate, f"{runs[who][0][1]:.5f}", ratio)
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


def ours(folder, dtype):
    """As ``gpt evaluate`` does it."""
    keep_freed_memory()
    model, tokenizer = load(folder, dtype=dtype)
    return lambda ids, stride: (
        score_text(model, tokenizer, ids.astype(np.uint32), stride=stride).loss
    )


def theirs(folder, dtype):
    """Nats per token, as transformers' documentation computes the perplexity of a long text."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def score(ids, stride):
        context, total, count, previous = model.config.n_positions, 0.0, 0, 0
        for start in range(0, len(ids), stride):
            end = min(start + context, len(ids))
            tokens = torch.from_numpy(ids[None, start:end])
            labels = tokens.clone()
            labels[:, : -(end - previous)] = -100
            n = int((labels[:, 1:] != -100).sum())
            total += model(tokens, labels=labels).loss.item() * n
            count, previous = count + n, end
            if end == len(ids):
                break
        return total / count

    return score


if __name__ == "__main__":
    main()
