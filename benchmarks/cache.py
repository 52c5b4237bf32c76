"""Memory and speed of a cache of 8 bits beside one of the model's dtype, at a long context.

``python benchmarks/cache.py [--model smollm2] [--context 8192] [--runs 24]``. A cache of each
format is filled with the keys and values of one prompt, again and again, up to the context. Then a
token is read through each cache in turns, so that the machine's drift meets both; figures are
medians. ``gpt evaluate MODEL --text TEXT --cache int8`` shows what the format costs in perplexity.
"""

import argparse
import statistics
import time

import torch
from machine import describe
from rich.console import Console
from rich.table import Table

from gpt.device import keep_freed_memory
from gpt.interop.load import load
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

FORMATS = ("float", "int8")
PROMPT = 256
"""Tokens whose keys and values fill the cache."""


def filled(model: GPT, stored_as: str, length: int) -> KVCache:
    """A cache that holds ``length`` tokens."""
    cache = model.new_cache(capacity=length + 1, stored_as=stored_as)
    model.features(torch.arange(100, 100 + PROMPT)[None], cache=cache)
    for tensor in (tensor for store in cache.stores.values() for tensor in store.tensors):
        for start in range(PROMPT, length, PROMPT):
            size = min(PROMPT, length - start)
            tensor[:, :, :, start : start + size] = tensor[:, :, :, :size]
    cache.lengths = [length]
    return cache


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=24)
    arguments = parser.parse_args()
    keep_freed_memory()
    model = load(arguments.model, weights="auto").model
    table = Table(title=f"{arguments.model}: a token more, after {arguments.context:,} tokens")
    for heading in ("cache", "MB", "ms", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    caches = {kind: filled(model, kind, arguments.context - 1) for kind in FORMATS}
    times: dict[str, list[float]] = {kind: [] for kind in FORMATS}
    token = torch.tensor([[100]])
    for run in range(arguments.runs + 2):
        for kind, cache in caches.items():
            start = time.perf_counter()
            model(token, cache=cache)
            if run > 1:
                times[kind].append(time.perf_counter() - start)
            cache.truncate(arguments.context - 1)
    for kind, cache in caches.items():
        took, name = statistics.median(times[kind]), f"{kind} ({cache.dtype})".replace("torch.", "")
        table.add_row(name, f"{cache.nbytes / 1e6:,.0f}", f"{1e3 * took:.1f}", f"{1 / took:.1f}")
    console = Console()
    console.print(describe(), highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
