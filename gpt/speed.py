"""How fast the machine is, measured: reading memory, and products of large matrices."""

import time
from collections.abc import Callable

import torch

BYTES = 256 << 20
"""Bytes that are read at a time, more than the caches of processors."""
WIDTHS = 1024, 2048
"""Rows and columns of the matrices that are multiplied. Some libraries are faster with the larger
ones, and the smaller ones stay in the caches."""
SECONDS = 0.3
"""How long a measurement takes."""


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from the host's memory."""
    numbers = torch.zeros(BYTES // 4)
    return BYTES / best_seconds(numbers.sum)


def product_flops(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s of products of large square matrices: the highest rate of :data:`WIDTHS`."""

    def rate(width: int) -> float:
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        return 2 * width**3 / best_seconds(lambda: a @ b)

    return max(map(rate, WIDTHS))


def best_seconds(function: Callable[[], object]) -> float:
    """Seconds of the fastest call in :data:`SECONDS`, after one that warms up."""
    function()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
