import subprocess
import sys

import pytest
import torch

from gpt import device as devices
from gpt.config import UsageError
from gpt.device import check_memory, choose_device, choose_precision, parse_device, peak_flops


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [
        (True, True, "cuda"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ],
)
def test_auto_takes_the_fastest_device_that_is_there(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == torch.device("cpu")
    if not mps:
        with pytest.raises(UsageError, match="device is 'mps', which torch does not find"):
            choose_device("mps")


@pytest.mark.parametrize(
    ("device", "native", "capabilities", "chosen"),
    [
        ("cuda", True, {}, torch.bfloat16),
        ("cuda", False, {}, torch.float16),
        ("mps", None, {}, torch.float32),
        ("cpu", None, {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", None, {"amx_bf16": True}, torch.bfloat16),
        ("cpu", None, {"bf16": True}, torch.bfloat16),
        ("cpu", None, {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("cpu", None, None, torch.float32),
    ],
)
def test_auto_precision_is_bfloat16_where_the_hardware_multiplies_it(
    device, native, capabilities, chosen, monkeypatch
):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    if capabilities is None:  # a torch from before it could be asked
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", torch.device(device)) == chosen
    assert choose_precision("float16", torch.device(device)) == torch.float16


ZEN3 = {"avx2": True, "avx_vnni": False, "avx512_f": False, "cpu_name": "AMD EPYC"}
ALDER_LAKE = ZEN3 | {"avx_vnni": True}
ZEN5 = ALDER_LAKE | {"avx512_f": True, "avx512_vnni": True, "avx512_bf16": True}
SAPPHIRE_RAPIDS = ZEN5 | {"amx_tile": True, "amx_bf16": True}


@pytest.mark.parametrize(
    ("capabilities", "limit", "name", "dtype"),
    [
        (ZEN3, None, "AVX2", torch.float32),
        (ALDER_LAKE, None, "AVX2 with VNNI", torch.float32),
        (ZEN5, None, "AVX-512 with bfloat16, VNNI", torch.bfloat16),
        (SAPPHIRE_RAPIDS, None, "AVX-512 with AMX, bfloat16, VNNI", torch.bfloat16),
        (SAPPHIRE_RAPIDS, "avx2", "AVX2", torch.float32),
        (ZEN5, "avx512", "AVX-512 with bfloat16, VNNI", torch.bfloat16),
        (SAPPHIRE_RAPIDS, "default", "x86_64", torch.float32),
    ],
)
def test_a_processor_has_a_class_and_may_be_limited_to_an_older_one(
    capabilities, limit, name, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if limit is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
    assert devices.cpu_class() == name
    assert choose_precision("auto", torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 64GB HBM2", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100X", None),
        ("NVIDIA A30", 165e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("Some other GPU", None),
    ],
)
def test_the_peak_is_that_of_the_gpus_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_memory_is_kept_where_the_c_library_can_be_told_so(monkeypatch):
    calls = []

    class Glibc:
        def mallopt(self, what, value):
            calls.append((what, value))

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Glibc())
    monkeypatch.setattr(devices.sys, "platform", "linux")
    devices.keep_freed_memory()
    assert calls == [(-4, 0), (-1, 2**31 - 1)]
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())  # another C library
    devices.keep_freed_memory()
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    monkeypatch.setattr(devices.ctypes, "CDLL", None)
    devices.keep_freed_memory()
    assert len(calls) == 2


def test_what_is_larger_than_the_memory_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(devices, "memory", lambda device: 8_000_000_000)
    cpu = torch.device("cpu")
    check_memory("the weights", 7.9e9, cpu, advice="take fewer")
    with pytest.raises(UsageError, match=r"weights need 8\.1 GB, and this machine has 8\.0 GB: t"):
        check_memory("the weights", 8.1e9, cpu, advice="take fewer")
    with pytest.raises(UsageError, match=r"need 8\.0e\+21 GB"):
        check_memory("the weights", 8e30, cpu, advice="take fewer")


def test_a_limit_of_the_process_counts_as_its_memory():
    code = (
        "import resource, torch\n"
        "resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30))\n"
        "from gpt.device import memory\n"
        "print(memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) <= 5 << 30


@pytest.mark.parametrize("name", ["tpu", "", "cpu:x", "meta", 3, None, "xla", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UsageError, match="device is"):
        parse_device(name)


def test_a_device_may_be_a_name_or_torchs_own():
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")


THREADS = """
import torch
from pathlib import Path
from gpt.device import end_idle_threads
def count():
    return len(list(Path("/proc/self/task").iterdir()))
def compute():
    torch.randn(300, 300) @ torch.randn(300, 300)
    torch.randn(1 << 20).exp()
torch.set_num_threads(4)
before = count()
compute()
busy = count()
end_idle_threads()
after = count()
compute()
print(before, busy, after, count())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_idle_threads_end_and_come_again():
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True
    )
    before, busy, after, again = map(int, done.stdout.split())
    assert busy == again > after == before
