"""What a training step with a mixture of experts costs: it follows the active experts, not all.

``python benchmarks/experts.py [--steps 8]``. A model of 4 layers x 384 (context 256, 8 sequences);
each row has more experts of the same width, of which one or two are active.
"""

import argparse
import statistics
import time

import torch
from machine import show
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.device import choose_precision
from gpt.model.moe import auxiliary_loss
from gpt.training.loss import summed_loss

BASE = {
    "vocab_size": 256, "context_length": 256, "n_layer": 4, "n_head": 6, "n_embd": 384,
    "mlp": "gated", "activation": "silu", "n_inner": 1024, "bias": False,
}  # fmt: skip
SHAPES = {
    "dense": {},
    **{
        f"{n} experts, {k} active": {
            "n_expert": n, "n_expert_active": k, "moe_balance": "mixtral", "moe_renormalise": k > 1,
        }
        for k in (1, 2)
        for n in (4, 8, 16)
    },
}  # fmt: skip


def step(model: GPT, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass, without the update, which touches every weight."""
    start = time.perf_counter()
    dtype = choose_precision("auto", torch.device("cpu"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(tokens[:, :-1])
    loss = summed_loss(logits, tokens[:, 1:]) / tokens[:, 1:].numel()
    auxiliary = auxiliary_loss(model)
    (loss if auxiliary is None else loss + auxiliary).backward()
    seconds = time.perf_counter() - start
    optimizer.step()
    optimizer.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = {name: GPT(ModelConfig(**BASE | changes)) for name, changes in SHAPES.items()}
    optimizers = {name: torch.optim.AdamW(m.parameters(), 1e-3) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(arguments.steps + 2):
        tokens = torch.randint(256, (8, 257))
        for name, model in models.items():
            seconds = step(model, optimizers[name], tokens)
            if number >= 2:
                times[name].append(seconds)
    table = Table("feed-forward", "parameters", "forward and backward, ms", "beside dense")
    dense = statistics.median(times["dense"])
    for name, model in models.items():
        seconds = statistics.median(times[name])
        row = f"{model.parameter_count():,}", f"{1000 * seconds:.0f}", f"{seconds / dense:.2f} x"
        table.add_row(name, *row)
    show(table)


if __name__ == "__main__":
    main()
