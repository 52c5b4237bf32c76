"""What the formats of the weights cost: losses and greedy texts of a run, in each beside float32.

``python benchmarks/quality.py RUN``. The loss is over the run's held-out text in windows of the
context, once read whole (as a prompt is) and once a token at a time (as text is written, where int8
and int4 round the activations too). The texts are 100 greedy ones, of prompts from the held-out
text.
"""

import argparse
import math
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from rich.table import Table

from gpt import load
from gpt.config import GenerationConfig, TrainConfig, parse
from gpt.data.prepare import prepare
from gpt.generation.decode import decode

FORMATS = ("float32", "bfloat16", "int8", "int4")
ROWS = 8


@torch.inference_mode()
def losses(model, windows: torch.Tensor, *, whole: bool) -> float:
    """Nats per token."""
    total = 0.0
    for rows in windows.split(ROWS):
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if whole:
            logits = model(tokens)
        else:
            cache = model.new_cache(len(rows))
            steps = tokens.split(1, dim=1)
            logits = torch.cat([model(step, cache=cache) for step in steps], dim=1)
        flat = logits.float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


def texts(model, prompts: list[list[int]], n: int) -> list[list[int]]:
    config = GenerationConfig(temperature=0, max_new_tokens=n)
    return [[token.id for token in decode(model, [prompt], config)] for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--new_tokens", type=int, default=100)
    arguments = parser.parse_args()
    config = parse(TrainConfig, [str(arguments.run / "config.toml")], prog="quality.py")
    held_out = prepare(config.data, arguments.run / "data").validation
    size = load(arguments.run).model.config.context_length
    n = min(arguments.windows, (len(held_out) - 1) // size)
    ids = torch.tensor(held_out.ids[: n * size + 1].astype("int64"))
    windows = ids.unfold(0, size + 1, size)
    starts = range(0, len(ids) - 40, len(ids) // 100)
    prompts = [ids[start : start + 32].tolist() for start in list(starts)[:100]]
    table = Table(title=f"{arguments.run}: {n:,} windows of {size} held-out tokens")
    for heading in ("weights", "perplexity", "increase", "token by token", "increase",
                    "identical texts", "identical tokens"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    first = None
    for kind in FORMATS:
        model = load(arguments.run, weights=kind).model
        prompt, written = (math.exp(losses(model, windows, whole=w)) for w in (True, False))
        got = texts(model, prompts, arguments.new_tokens)
        first = first or (prompt, written, got)
        same = sum(a == b for a, b in zip(got, first[2], strict=True))
        until = [next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
                 for a, b in zip(got, first[2], strict=True)]  # fmt: skip
        table.add_row(
            kind,
            f"{prompt:.4f}",
            f"{prompt / first[0] - 1:+.3%}",
            f"{written:.4f}",
            f"{written / first[1] - 1:+.3%}",
            f"{same} of {len(prompts)}",
            f"{sum(until) / len(until):.0f} of {arguments.new_tokens}",
        )
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
