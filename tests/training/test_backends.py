import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl, register_flash_attention_impl

from gpt.config import ParallelConfig, TrainingConfig
from gpt.training import backends, build
from gpt.training.backends import choose_attention, measure
from gpt.training.parallel import World

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def cudnn():
    """Whether CUDA's attention may use cuDNN; restored afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("times", "line"),
    [
        (
            {"cudnn": 0.001, "flash": 0.0015},
            "attention cudnn (forward and backward: cudnn 1.000 ms, flash 1.500 ms)",
        ),
        (
            {"cudnn": 0.002, "flash": 0.0015},
            "attention flash (forward and backward: cudnn 2.000 ms, flash 1.500 ms)",
        ),
        ({}, "attention flash (no other can be used)"),
    ],
)
def test_training_on_cuda_uses_the_faster_attention_and_says_so(
    times, line, tiny_config, monkeypatch, cudnn
):
    monkeypatch.setattr(backends, "measure", lambda *args, **options: times)
    said = []
    options = {"rows": 4, "dtype": torch.bfloat16, "say": said.append}
    choose_attention(tiny_config, World(), device=CUDA, **options)
    assert said == [line]
    assert cudnn() == line.startswith("attention cudnn")


@pytest.fixture
def flash_3(monkeypatch):
    """As if FlashAttention 3 were installed on Hopper: the times when torch switched it off."""
    removed, broken = [], []

    def install():
        if broken:
            raise broken[0]
        return Handle()

    class Handle:
        def remove(self):
            removed.append(current_flash_attention_impl())

    registry = torch.nn.attention._registry._FLASH_ATTENTION_IMPLS
    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_IMPLS", dict(registry))
    register_flash_attention_impl("FA3", register_fn=install)
    monkeypatch.setattr(backends, "FLASH_3_PACKAGE", "torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield SimpleNamespace(removed=removed, broken=broken)
    backends._use_flash_3(False)


def test_flash_attention_3_is_used_while_it_is_the_fastest(
    flash_3, tiny_config, monkeypatch, cudnn
):
    times = {"flash": 0.003, "cudnn": 0.002, "flash 3": 0.001}
    monkeypatch.setattr(backends, "measure", lambda *args, **options: times)
    options = {"rows": 4, "dtype": torch.bfloat16, "say": print}
    choose_attention(tiny_config, World(), device=CUDA, **options)
    assert current_flash_attention_impl() == "FA3"
    assert not cudnn()
    times["flash"] = 0.0001
    choose_attention(tiny_config, World(), device=CUDA, **options)
    assert current_flash_attention_impl() is None
    assert flash_3.removed == ["FA3"]


def test_flash_attention_3_is_timed_where_it_is_for(flash_3, tiny_config, monkeypatch):
    half = {"dtype": torch.bfloat16, "fits": False}
    assert list(measured(tiny_config, monkeypatch, **half)) == ["flash", "flash 3"]
    assert flash_3.removed
    assert current_flash_attention_impl() is None  # until it is chosen
    flash_3.broken.append(ImportError("undefined symbol"))
    assert measured(tiny_config, monkeypatch, **half) == {}
    flash_3.broken.clear()
    dropped = dataclasses.replace(tiny_config, dropout=0.1)
    assert measured(dropped, monkeypatch, **half) == {}
    assert measured(tiny_config, monkeypatch, **half | {"dtype": torch.float32}) == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert measured(tiny_config, monkeypatch, **half) == {}
    monkeypatch.setattr(backends, "FLASH_3_PACKAGE", "no_such_package")
    assert not backends.has_flash_3(torch.device("cpu"))


def test_on_other_devices_attention_is_not_measured(tiny_config, monkeypatch, cudnn):
    monkeypatch.setattr(backends, "measure", None)
    before, said = cudnn(), []
    options = {"rows": 4, "dtype": torch.bfloat16, "say": said.append}
    choose_attention(tiny_config, World(), device=torch.device("cpu"), **options)
    assert (cudnn(), said) == (before, [])


def test_a_run_chooses_its_attention_before_it_compiles_the_blocks(monkeypatch, tiny_config):
    order = []
    for name in ("choose_attention", "compile_blocks"):

        def called(*args, name=name, **options):
            order.append((name, options["device"], options.get("rows")))

        monkeypatch.setattr(build, name, called)
    training, device = TrainingConfig(micro_batch_size=4), torch.device("cpu")
    groups = (tiny_config, training, ParallelConfig())
    options = {"device": device, "dtype": torch.bfloat16, "say": print}
    build.build_model(*groups, World(), "single", **options)
    assert order == [("choose_attention", device, 4), ("compile_blocks", device, None)]


def measured(config, monkeypatch, *, fits=True, wrong=0.0, fails=False, dtype=torch.float32):
    """On the CPU, with its own kernel for all; cuDNN's has an error of ``wrong``, or fails."""
    inside = []

    @contextlib.contextmanager
    def only(backends):
        inside.append(backends)
        yield
        inside.pop()

    fused = backends.F.scaled_dot_product_attention

    def attention(*args, **options):
        if fails and inside == [backends.KERNELS["cudnn"]]:
            raise RuntimeError("cuDNN has no valid execution plan")
        y = fused(*args, **options)
        return y + wrong if inside == [backends.KERNELS["cudnn"]] else y

    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params: fits)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(backends, "sdpa_kernel", only)
    monkeypatch.setattr(backends.F, "scaled_dot_product_attention", attention)
    return measure(config, rows=2, device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize("grouped", [False, True])
def test_both_kernels_are_timed_if_they_agree(grouped, tiny_config, monkeypatch):
    if grouped:
        tiny_config = type(tiny_config)(context_length=16, n_head=4, n_kv_head=2, n_embd=32)
    times = measured(tiny_config, monkeypatch)
    assert list(times) == ["flash", "cudnn"]
    assert all(seconds > 0 for seconds in times.values())


def test_cudnns_attention_is_not_used_if_it_is_wrong_or_has_no_kernel(tiny_config, monkeypatch):
    assert measured(tiny_config, monkeypatch, fits=False) == {}
    assert measured(tiny_config, monkeypatch, wrong=10.0) == {}


def test_a_failing_cudnn_kernel_is_not_used_and_does_not_end_the_run(tiny_config, monkeypatch):
    assert measured(tiny_config, monkeypatch, fails=True) == {}
