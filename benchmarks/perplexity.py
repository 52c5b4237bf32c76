"""Perplexity of a text with a sliding window: this project beside the usual Hugging Face stride
loop.

``python benchmarks/perplexity.py [--stride 512] [--tokens 8192] [--dtype float32]``. GPT-2 124M
with random weights, the same in both. A window here predicts as many tokens as it reads, in the
loop one fewer: their windows end a token apart, and the losses differ in the fifth digit.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import describe, medians
from rich.console import Console
from rich.table import Table
from transformers import GPT2LMHeadModel

from gpt import GPT, ModelConfig
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.evaluation.perplexity import score_text
from gpt.interop.export import export_huggingface


@torch.inference_mode()
def stride_loop(model: GPT2LMHeadModel, ids: torch.Tensor, stride: int) -> float:
    """Nats per token, as transformers' documentation computes the perplexity of a long text."""
    context, total, count, previous = model.config.n_positions, 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        tokens = ids[None, start:end]
        labels = tokens.clone()
        labels[:, : -(end - previous)] = -100
        n = int((labels[:, 1:] != -100).sum())
        total += model(tokens, labels=labels).loss.item() * n
        count, previous = count + n, end
        if end == len(ids):
            break
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer.released()
    ours = GPT(ModelConfig()).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(ours, tokenizer, Path(folder) / "model")
        theirs = GPT2LMHeadModel.from_pretrained(Path(folder) / "model", dtype=dtype).eval()
    ours = ours.to(dtype)
    ids = np.random.Generator(np.random.Philox(0)).integers(0, 50257, arguments.tokens)
    ids = ids.astype(np.uint32)
    tokens = torch.from_numpy(ids.astype(np.int64))
    losses = {}

    def mine() -> None:
        losses["mine"] = score_text(ours, tokenizer, ids, stride=arguments.stride).loss

    def their() -> None:
        losses["theirs"] = stride_loop(theirs, tokens, arguments.stride)

    time = medians({"mine": mine, "theirs": their}, runs=arguments.runs)
    title = f"{arguments.tokens:,} tokens, stride {arguments.stride}, {arguments.dtype}"
    table = Table(title=title)
    for heading in ("", "tokens/s", "nats/token", "this project is"):
        table.add_column(heading, justify="left" if not heading else "right")
    rate = {name: f"{arguments.tokens / seconds:,.0f}" for name, seconds in time.items()}
    table.add_row("this project", rate["mine"], f"{losses['mine']:.5f}", "")
    ratio = f"{time['theirs'] / time['mine']:.2f} x"
    table.add_row("Hugging Face, stride loop", rate["theirs"], f"{losses['theirs']:.5f}", ratio)
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
