"""Text without end by a model with attention windows and sinks: time per token and memory, by how
much is written already.

``python benchmarks/endless.py [--tokens 20000] [--weights bfloat16]``. The model has GPT-2 124M's
widths, rotary positions, and random weights. Beside it is a model without windows: its cache is as
long as the text, and is allocated at the start.
"""

import argparse
import dataclasses
import time

import torch
from machine import show
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.config import GenerationConfig
from gpt.generation.decode import Decoder
from gpt.generation.inference import prepare_for_inference

WINDOWED = ModelConfig(position="rotary", window=256, sinks=4)
FULL = dataclasses.replace(WINDOWED, window=0, sinks=0, context_length=1 << 20)


def run(config: ModelConfig, policy: str, tokens: int, weights: str) -> list[tuple[float, int]]:
    """For each tenth of the text, milliseconds a token, and bytes of the cache at its end."""
    torch.manual_seed(0)
    model = prepare_for_inference(GPT(config).eval(), weights)
    settings = GenerationConfig(temperature=1.0, seed=0, max_new_tokens=tokens, past_context=policy)
    decoder = Decoder(model, settings)
    decoder.add([1, 2, 3])
    decoder.advance()
    found = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(tokens // 10 - 1):
            decoder.advance()
        seconds = (time.perf_counter() - start) / (tokens // 10 - 1)
        found.append((1000 * seconds, decoder._cache.nbytes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--weights", default="auto")
    arguments = parser.parse_args()
    sizes = arguments.tokens, arguments.weights
    windowed = run(WINDOWED, "sinks", *sizes)
    full = run(FULL, "stop", *sizes)
    table = Table(
        "tokens written", "window 256, sinks 4: ms/token", "MB", "no window: ms/token", "MB"
    )
    for i, ((mine, held), (other, grown)) in enumerate(zip(windowed, full, strict=True), 1):
        written = f"{i * arguments.tokens // 10:,}"
        row = f"{mine:.2f}", f"{held / 1e6:.1f}", f"{other:.2f}", f"{grown / 1e6:.1f}"
        table.add_row(written, *row)
    show(table)


if __name__ == "__main__":
    main()
