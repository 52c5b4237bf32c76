"""Many prompts at once, deep contexts, and guesses: tokens/s of batches, the price of depth, and
the speed-up of speculative decoding.

``python benchmarks/generate.py [--weights bfloat16] [--runs 3]``. GPT-2 124M with random weights:
greedy, 64 prompts of 8 to 128 tokens, 64 new ones each, beside Hugging Face's ``generate`` on the
same prompts padded on the left. Depth: a token's time behind 64 and behind 900, with a head of keys
for each head of queries, and for each four. Look-up on a model that repeats itself as greedy text
of small models does. A run trained here, ``--run runs/shakespeare``, is measured with look-up too.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe, medians
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import GPT, ModelConfig, load, prepare_for_inference
from gpt.config import GenerationConfig
from gpt.device import keep_freed_memory
from gpt.generation.decode import decode
from gpt.generation.speculative import PromptLookup, Speculator

NEW = 64
FORMATS = ("float32", "bfloat16", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="bfloat16", choices=FORMATS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch_sizes", default="1,4,16,64")
    parser.add_argument("--run", default="runs/shakespeare")
    arguments = parser.parse_args()
    kind = arguments.weights
    dtype = getattr(torch, kind) if kind.endswith(("32", "16")) else torch.bfloat16
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    torch.manual_seed(0)
    ours = prepare_for_inference(GPT(ModelConfig()).to(device), kind)
    theirs = GPT2LMHeadModel(GPT2Config()).to(device, dtype).eval()
    draw = random.Random(0)
    prompts = [draw.choices(range(50257), k=draw.randint(8, 128)) for _ in range(64)]

    title = f"ragged prompts, {NEW} new tokens each"
    peer = f"Hugging Face, {str(dtype).removeprefix('torch.')}"
    table = Table("batch", "prompts", f"this project, {kind}, tokens/s", peer, "ratio", title=title)
    config = GenerationConfig(temperature=0, max_new_tokens=NEW)
    for size in map(int, arguments.batch_sizes.split(",")):
        some = prompts[: max(4, min(64, 2 * size))]
        time = medians(
            {
                "mine": lambda size=size, some=some: list(
                    decode(ours, some, config, batch_size=size)
                ),
                "theirs": lambda size=size, some=some: hugging_face(theirs, some, size),
            },
            runs=arguments.runs,
        )
        rate = {who: len(some) * NEW / seconds for who, seconds in time.items()}
        ratio = f"{rate['mine'] / rate['theirs']:.2f} x"
        table.add_row(
            str(size), str(len(some)), f"{rate['mine']:,.0f}", f"{rate['theirs']:,.0f}", ratio
        )
    console.print(table)

    title = f"milliseconds for a token of each row, {kind}"
    table = Table("key heads", "batch", "after 64 tokens", "after 900 tokens", "ratio", title=title)
    for kv_heads in (12, 3):
        config = ModelConfig(n_kv_head=kv_heads)
        model = prepare_for_inference(GPT(config).to(device), kind)
        for size in (1, 16):
            time = medians(
                {n: step_at(model, size, n) for n in (64, 900)}, runs=10 * arguments.runs
            )
            table.add_row(
                str(kv_heads),
                str(size),
                *(f"{1000 * seconds:.2f}" for seconds in time.values()),
                f"{time[900] / time[64]:.2f} x",
            )
    console.print(table)

    title = f"look-up, greedy, 200 new tokens, {kind}"
    table = Table("", "plain, tokens/s", "guessing 8", "speed-up", "tokens per pass", title=title)
    prompt = prompts[0][:20] * 3
    lookup(
        table, "GPT-2 124M, random weights, a prompt repeated three times", ours, prompt, arguments
    )
    if Path(arguments.run).exists():
        model, tokenizer = load(arguments.run, device=device, weights=kind)
        prompt = tokenizer.encode("ROMEO:\n").tolist()
        lookup(table, arguments.run, model, prompt, arguments)
    console.print(table)


def step_at(model: GPT, batch_size: int, depth: int) -> Callable[[], object]:
    """A function that decodes one token of each row behind ``depth`` others."""
    cache = model.new_cache(batch_size)
    cache.lengths = [depth] * batch_size  # of zeros: what they are does not matter to the time
    tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def step() -> None:
        model(tokens, cache=cache)
        cache.truncate(depth)

    return step


def lookup(table, name, model, prompt, arguments) -> None:
    """A row: plain decoding beside guesses from the text itself."""
    config = GenerationConfig(temperature=0, max_new_tokens=200)
    read = []

    def guessing() -> None:
        speculator = Speculator(model, config, PromptLookup(), num_draft_tokens=8)
        list(speculator.decode(prompt))
        read.append(speculator.written / speculator.rounds)

    plain = lambda: list(decode(model, [prompt], config))  # noqa: E731
    time = medians({"plain": plain, "guessing": guessing}, runs=arguments.runs)
    table.add_row(
        name,
        f"{200 / time['plain']:,.0f}",
        f"{200 / time['guessing']:,.0f}",
        f"{time['plain'] / time['guessing']:.2f} x",
        f"{read[-1]:.2f}",
    )


def hugging_face(model, prompts, batch_size) -> None:
    """Batches in order, padded on the left."""
    device = model.device
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in some], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=device)
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )


if __name__ == "__main__":
    main()
