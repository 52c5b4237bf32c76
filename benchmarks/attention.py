"""Causal attention in training on a CPU: ``python benchmarks/attention.py``.

Milliseconds of a forward and a backward pass of one layer, medians of 7 turns: torch's fused
attention, the plain formula, and this project's kernels by the number of queries in a block.
Training uses :data:`gpt.training_kernels.QUERIES`.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import medians, show
from rich.table import Table

from gpt import training_kernels
from gpt.device import choose_precision, keep_freed_memory
from gpt.model.attend import PLAIN_UP_TO, _plain

SHAPES = [
    (16, 2, 2, 128, 64, 0.0), (16, 6, 6, 256, 64, 0.2), (16, 3, 3, 256, 128, 0.1),
    (8, 9, 3, 256, 64, 0.0), (4, 12, 12, 1024, 64, 0.0), (1, 12, 12, 2048, 64, 0.0),
    (1, 12, 12, 4096, 64, 0.0),
]  # fmt: skip
"""Batch, query heads, key heads, tokens, head dimension, dropout."""
BLOCKS = 64, 128, 256, 512
WHOLE = "one block"


def ways(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A step of each way that computes this shape."""
    B, H, kv_heads, T, D = shape
    q, k, v = (torch.randn(B, n, T, D, dtype=dtype) for n in (H, kv_heads, kv_heads))
    slope, scale = torch.randn_like(q), D**-0.5
    for x in (q, k, v):
        x.requires_grad_()

    def fused() -> None:
        options = {"is_causal": True, "enable_gqa": kv_heads != H}
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, **options), (q, k, v), slope)

    def plain() -> None:
        torch.autograd.grad(_plain(q, k, v, None, p, None), (q, k, v), slope)

    def kernels(queries: int) -> None:
        training_kernels.QUERIES = queries
        y = training_kernels.causal_attention(q, k, v, p=p, scale=scale)
        torch.autograd.grad(y, (q, k, v), slope)

    found: dict[str, Callable[[], object]] = {} if p else {"fused": fused}
    if T <= PLAIN_UP_TO:
        found["plain"] = plain
    sizes = {WHOLE: T} | {str(n): n for n in BLOCKS if n < T}
    return found | {name: functools.partial(kernels, n) for name, n in sizes.items()}


def main() -> None:
    keep_freed_memory()
    training_kernels.load()
    table = Table(title="Forward and backward, ms")
    columns = ["fused", "plain", *map(str, BLOCKS), WHOLE]
    for heading in (
        "batch, query heads, key heads, tokens, head dimension, dropout",
        "dtype",
        *columns,
    ):
        table.add_column(heading, justify="right" if heading in columns else "left")
    fast = choose_precision("auto", torch.device("cpu"))
    for dtype in dict.fromkeys((fast, torch.float32)):
        for *shape, p in SHAPES:
            torch.manual_seed(0)
            times = medians(ways(tuple(shape), p, dtype), runs=7)
            cells = [f"{1000 * times[name]:.1f}" if name in times else "" for name in columns]
            name = f"{', '.join(map(str, shape))}, {p:g}"
            table.add_row(name, str(dtype).removeprefix("torch."), *cells)
    show(table)


if __name__ == "__main__":
    main()
