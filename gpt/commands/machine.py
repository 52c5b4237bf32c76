"""The machine, for ``gpt doctor``: processor, compiler, threads, memory, GPUs, disk."""

import functools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gpt import cpp_library, kernels, training_kernels
from gpt.commands.findings import Finding, advice, note, ok
from gpt.config import UsageError, foreign
from gpt.device import (
    available_cores,
    choose_precision,
    cpu_class,
    cpu_features,
    cpu_limit,
    free_memory,
    memory,
    peak_flops,
    processor_name,
)
from gpt.speed import product_flops, read_bandwidth

CPU = torch.device("cpu")
SMALL_MEMORY, SMALL_DISK = 2e9, 5e9
"""Bytes below which there is advice."""
SLOW_READ = 5e9
"""Bytes per second below which the memory is called slow; one channel of DDR4 reads 15e9."""


def checks(folder: Path) -> Sequence[Callable[[], Finding | list[Finding]]]:
    """The checks, in the order of the output."""
    disk = functools.partial(_disk, folder)
    return _python, _processor, _compiler, _kernels, _torch, _threads, _memory, _speed, _gpus, disk


def _python() -> Finding:
    said = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return ok("python", f"{said}, {foreign(sys.executable)}")


def _processor() -> Finding:
    features = cpu_features()
    sets = sorted(each for each in features if each.startswith(("avx", "amx", "sve", "dot", "bf")))
    said = f"{processor_name()}: {cpu_class()}"
    said += f" ({', '.join(sets)})" if sets else ""
    if limit := cpu_limit():
        what = "unset ATEN_CPU_CAPABILITY to use all that the processor has"
        return advice("processor", f"{said}, limited to {limit}", what)
    return ok("processor", said)


def _compiler() -> Finding:
    try:
        command = cpp_library.compiler()
    except UsageError as error:
        what = "install g++ (apt install g++, dnf install gcc-c++, xcode-select --install)"
        return advice("compiler", str(error), what)
    done = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, errors="replace"
    )
    return ok("compiler", foreign((done.stdout.splitlines() or command)[0]))


def _kernels() -> Finding:
    if problem := kernels.problem() or training_kernels.problem():
        what = "the CPU is slower without the kernels; they need a working compiler"
        return advice("kernels", problem, what)
    formats = ", ".join(kernels.FORMATS)
    return ok("kernels", f"for training, and decoding with {formats}; compiled for this processor")


def _torch() -> Finding:
    cuda = torch.version.cuda
    build = f"CUDA {cuda}" if cuda else "CPU only"
    said = f"{torch.__version__} ({build}), products in {_name(choose_precision('auto', CPU))}"
    if not cuda and _has_nvidia():
        what = "this machine has an NVIDIA GPU: install torch for CUDA (pytorch.org lists the line)"
        return advice("torch", said, what)
    if cuda and _has_nvidia() and not torch.cuda.is_available():
        what = "torch does not find the GPU: the driver may be older than this CUDA (nvidia-smi)"
        return advice("torch", said, what)
    return ok("torch", said)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _threads() -> Finding:
    n, cores = torch.get_num_threads(), available_cores()
    set_by = "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else ""
    said = f"{n} of torch on {cores:g} usable cores" + (f", set by {set_by}" if set_by else "")
    if n > max(1, cores):
        right = max(1, int(cores))
        what = f"more threads than cores wait for each other: export OMP_NUM_THREADS={right}"
        return advice("threads", said, what)
    if set_by and n < int(cores):
        return note("threads", said, "unset OMP_NUM_THREADS to use all cores")
    return ok("threads", said)


def _memory() -> Finding:
    total, free = memory(CPU), free_memory()
    said = f"{total / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free"
    if free < SMALL_MEMORY:
        return advice("memory", said, "close other programs, or use --weights int8 or int4")
    return ok("memory", said)


def _speed() -> list[Finding]:
    reads, start = read_bandwidth(), time.perf_counter()
    bandwidth = f"reads {reads / 1e9:.0f} GB/s"
    slow = "decoding is limited by this; close other programs, or use --weights int8 or int4"
    name = "memory bandwidth"
    found = [ok(name, bandwidth) if reads >= SLOW_READ else advice(name, bandwidth, slow)]
    fast = choose_precision("auto", CPU)
    said = [f"{_name(torch.float32)} {product_flops(torch.float32) / 1e9:,.0f} GFLOP/s"]
    if fast != torch.float32:
        said.append(f"{_name(fast)} {product_flops(fast) / 1e9:,.0f} GFLOP/s")
    took = time.perf_counter() - start
    return [*found, ok("matrix products", f"{', '.join(said)} (measured in {took:.1f} s)")]


def _gpus() -> list[Finding]:
    if torch.backends.mps.is_available():
        return [ok("gpu", "Apple's MPS")]
    if not torch.cuda.is_available():
        return [note("gpu", "none that torch can use")]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        peak = peak_flops(device)
        said = f"{torch.cuda.get_device_name(device)}, {memory(device) / 1e9:.0f} GB, "
        said += f"peak {peak / 1e12:,.0f} TFLOP/s" if peak else "peak not known"
        found.append(ok(f"gpu {index}", f"{said}, {_name(choose_precision('auto', device))}"))
    return found


def _disk(folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"folder {foreign(folder)} cannot be read: {error.strerror}") from None
    said = f"{free / 1e9:,.0f} GB free in {foreign(folder.resolve())}"
    if not os.access(folder, os.W_OK):
        return advice("disk", f"{said}, not writable", "choose a folder of yours with --run_dir")
    if free < SMALL_DISK:
        return advice("disk", said, "checkpoints take 12 bytes for each parameter; free some space")
    return ok("disk", said)
