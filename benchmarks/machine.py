"""The machine and the versions that a figure belongs to, and the median of repeated timings."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from gpt.device import cpu_class, cpu_limit


def describe() -> str:
    """One line: the processor's class first, then its name, threads, and versions."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    limited = " (limited by ATEN_CPU_CAPABILITY)" if cpu_limit() is not None else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{cpu_class()}{limited}: {capabilities.get('cpu_name', platform.processor())}, "
        f"{torch.get_num_threads()} threads, {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def show(table: Table) -> None:
    """Print the machine and a table of its figures, wide enough for both."""
    console = Console(width=max(100, Console().width))
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


def bandwidth() -> float:
    """Bytes/s at which large memory is summed, the best of some tries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.ones(1 << 28, dtype=torch.uint8, device=device).view(torch.int64)
    best = min(seconds(lambda: memory.sum()) for _ in range(10))
    return memory.nbytes / best


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], object]], *, runs: int) -> dict[str, float]:
    """Median seconds of each function, run in turns after a warm-up, so that drift meets them
    all.
    """
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}
