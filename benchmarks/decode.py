"""Greedy decoding of GPT-2 124M with random weights: with the cache, without it, and Hugging Face.

``python benchmarks/decode.py [--dtype bfloat16] [--runs 5]``. Everything runs in this process, in
turns; the figures are medians, prefill included.
"""

import argparse

import torch
from machine import describe, medians
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import GPT, ModelConfig
from gpt.config import GenerationConfig
from gpt.generation.decode import decode


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@torch.inference_mode()
def without_cache(model: GPT, prompt: torch.Tensor, n: int) -> None:
    tokens = prompt
    for _ in range(n):
        tokens = torch.cat([tokens, greedy(model(tokens, last_only=True)[:, -1])[:, None]], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    ours = GPT(ModelConfig()).to(device, dtype).eval()
    theirs = GPT2LMHeadModel(GPT2Config()).to(device, dtype).eval()
    prompt = torch.randint(50257, (1, arguments.prompt_tokens), device=device)

    def cached(n: int) -> None:
        config = GenerationConfig(temperature=0, max_new_tokens=n)
        for _ in decode(ours, prompt.tolist(), config):
            pass

    def hugging_face(n: int) -> None:
        theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )

    time = medians(
        {
            "cached": lambda: cached(128),
            "hugging face": lambda: hugging_face(128),
        },
        runs=arguments.runs,
    )
    long = medians(
        {
            "cached": lambda: cached(256),
            "without": lambda: without_cache(ours, prompt, 256),
        },
        runs=min(3, arguments.runs),
    )

    table = Table(title=f"GPT-2 124M, {arguments.dtype}, {arguments.prompt_tokens} prompt tokens")
    for heading in ("", "new tokens", "tokens/s", "this project is"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("this project, KV cache", "128", f"{128 / time['cached']:.1f}", "")
    table.add_row(
        "Hugging Face generate, its cache",
        "128",
        f"{128 / time['hugging face']:.1f}",
        f"{time['hugging face'] / time['cached']:.2f} x",
    )
    table.add_row("this project, KV cache", "256", f"{256 / long['cached']:.1f}", "")
    table.add_row(
        "this project, no cache",
        "256",
        f"{256 / long['without']:.1f}",
        f"{long['without'] / long['cached']:.2f} x",
    )
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
