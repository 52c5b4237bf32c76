"""The machine: device, fast and safe precision, peak speed, memory."""

import contextlib
import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt.config import Device, Precision, UsageError, foreign, quoted

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# FLOP/s of dense bfloat16 matrix products with float32 sums, from the makers' data sheets. A key is
# a regular expression for the driver's whole name of the GPU, without "NVIDIA" and "GeForce":
# laptop GPUs, other memory sizes and MIG slices have other peaks.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200 (480GB|144G HBM3e)": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100 80GB HBM3": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": 312e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
}


def choose_device(name: Device) -> torch.device:
    """The device that ``name`` selects; ``UsageError`` if the machine does not have it."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    if not has[name]:
        fits = ", ".join(["auto", *(kind for kind in has if has[kind])])
        raise UsageError(f"device is {name!r}, which torch does not find; choose from {fits}")
    return torch.device(name)


def parse_device(name: torch.device | str) -> torch.device:
    """The device with a name such as ``cpu`` or ``cuda:1``; ``UsageError`` if torch does not know
    it or the machine does not have it.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        kind: Any = ""
    else:
        kind = device.type
    if name is None or kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device is {quoted(name)}, and must be cpu, cuda, cuda:1 (...) or mps")
    choose_device(kind)
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {name}, and this machine has {torch.cuda.device_count()} GPUs")
    return device


def choose_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. ``auto`` takes bfloat16 if the hardware supports it natively,
    else float16 on a GPU and float32 elsewhere.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return torch.bfloat16
    return torch.float32


def cpu_limit() -> str | None:
    """``avx2`` or ``default`` if the user limits torch to an older x86 instruction set with
    ``ATEN_CPU_CAPABILITY``, else ``None``. The limit applies to this project too.
    """
    limit = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    return limit if limit in ("avx2", "default") else None


def cpu_features() -> frozenset[str]:
    """The instruction sets that may be used, by torch's names: ``avx2``, ``avx512_bf16``, ... Empty
    if torch is too old to have ``get_capabilities``.
    """
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    features = {name for name, has in capabilities.items() if has is True}
    if cpu_limit() is not None:
        features = {name for name in features if not name.startswith(("avx512", "avx10", "amx"))}
        features -= {"avx_vnni", *(["avx2"] if cpu_limit() == "default" else [])}
    return frozenset(features)


def cpu_class() -> str:
    """The class of the processor, to report beside a speed: ``AVX2``, ``AVX-512 with bfloat16,
    VNNI`` and so on.
    """
    features = cpu_features()
    wide = "avx512_f" in features
    name = "AVX-512" if wide else "AVX2" if "avx2" in features else platform.machine()
    extras = {
        "AMX": "amx_tile" in features,
        "bfloat16": bool(features & {"avx512_bf16", "bf16"}),
        "VNNI": ("avx512_vnni" if wide else "avx_vnni") in features,
        "dot product": "dot" in features,
    }
    has = [extra for extra, there in extras.items() if there]
    return f"{name} with {', '.join(has)}" if has else name


def processor_name() -> str:
    """The processor's name as its maker gives it, or the kind of machine."""
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", said, re.MULTILINE)
        if found:
            return foreign(found[1].strip())
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, str]:
    """What a run records of the machine that it runs on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": f"{processor_name()}, {available_cores():g} cores, {cpu_class()}",
        "memory": f"{memory(torch.device('cpu')) / 1e9:.0f} GB",
        "GPUs": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    By default glibc returns each large block to the system. A training step on a CPU then spends a
    fifth of its time on page faults. Call it once, at the start. It is a no-op without glibc.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    _set_malloc({m_mmap_max: 0, m_trim_threshold: 2**31 - 1})


def return_freed_memory() -> None:
    """Let glibc return each freed block of a quarter megabyte to the system at once, for a process
    that is to need little memory. Without it, blocks that live long keep those between them. Call
    it once, at the start. It is a no-op without glibc.
    """
    m_mmap_threshold = -3
    _set_malloc({m_mmap_threshold: 1 << 18})


def end_idle_threads() -> None:
    """End the threads that OpenMP keeps for the calling thread, until it needs them again.

    Each thread that computes has OpenMP threads of its own. If one thread loads a model and another
    runs it, the process has more OpenMP threads than cores. libgomp then makes them sleep at each
    barrier, and a token of a small model takes almost twice as long. It is a no-op without libgomp.
    """
    pause_soft = 1  # from omp.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_pause_resource_all(pause_soft)


def _set_malloc(options: dict[int, int]) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of bfloat16 matrix products; ``None`` if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((peak for known, peak in PEAK_FLOPS.items() if re.fullmatch(known, name)), None)


def memory(device: torch.device) -> int:
    """Bytes of memory that a process may use on ``device``: the GPU's memory, or the lowest of the
    host's memory and the limits of the container and of the process (``ulimit -v``).
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # "max": no limit
            continue
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits += [] if soft == resource.RLIM_INFINITY else [soft]
    return min(limits)


def free_memory() -> int:
    """Bytes of the host's memory that are free, or that programs would give back for it."""
    free = memory(torch.device("cpu"))
    with contextlib.suppress(OSError, AttributeError):
        said = Path("/proc/meminfo").read_text(encoding="ascii")
        found = re.search(r"^MemAvailable:\s+(\d+) kB", said, re.MULTILINE)
        free = min(free, 1024 * int(found[1]) if found else free)
    return free


def available_cores() -> float:
    """Cores that this process may use: those of its affinity, or the share that its container
    has.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores: float = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, int(quota) / int(period))  # "max" is no number
    return cores


def check_memory(what: str, needed: float, device: torch.device, *, advice: str) -> None:
    """``UsageError`` with both numbers if ``what`` (a plural) need more bytes than ``device`` has.
    ``advice`` says what needs less.
    """
    has = memory(device)
    if needed > has:
        where = "this machine" if device.type != "cuda" else "the GPU"
        raise UsageError(
            f"{what} need {_gigabytes(needed)}, and {where} has {_gigabytes(has)}: {advice}"
        )


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number < 1e14 else f"{number / 1e9:.1e} GB"
