"""The attention kernels for training on CUDA, chosen by measurement: torch's own, cuDNN's, and
FlashAttention 3 (arXiv:2407.08608) on Hopper where its package is installed.

Which is the fastest depends on the GPU, the shape and the versions. So each run first times them,
forward and backward, on its own shape. A kernel is used only if its results agree with those of
torch's own.
"""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt.config import ModelConfig
from gpt.model.attend import INFERENCE
from gpt.training.parallel import World

KERNELS = {
    "flash": INFERENCE,
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash 3": [SDPBackend.FLASH_ATTENTION],
}
"""The candidates by name. If flash attention does not support a shape, torch uses its next one."""
FLASH_3 = "FA3"
"""torch's name of FlashAttention 3."""
FLASH_3_PACKAGE = "flash_attn_interface"
"""The module that torch takes it from."""
CAN_SWITCH = hasattr(attention, "restore_flash_attention_impl")
"""Whether this torch can change the version of flash attention."""
TOLERANCE = 0.05
"""Relative to the largest number; larger than the rounding errors of bfloat16."""
WARM_UP, TIMED = 3, 20


def choose_attention(
    config: ModelConfig,
    world: World,
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> None:
    """Use the fastest kernel for ``rows`` sequences of the full context in this process; ``say``
    gets the result. All processes use the main process's measurement.
    """
    if device.type != "cuda":
        return
    times = world.broadcast(lambda: measure(config, rows=rows, device=device, dtype=dtype))
    chosen = min(times, key=lambda name: times[name], default="flash")
    torch.backends.cuda.enable_cudnn_sdp(chosen == "cudnn")
    _use_flash_3(chosen == "flash 3")
    measured = ", ".join(f"{name} {1000 * seconds:.3f} ms" for name, seconds in times.items())
    reason = f"forward and backward: {measured}" if times else "no other can be used"
    say(f"attention {chosen} ({reason})")


def _use_flash_3(use: bool) -> None:
    """Whether torch's flash attention is version 3, in this process."""
    if use:
        attention.activate_flash_attention_impl(FLASH_3)
    elif CAN_SWITCH and attention.current_flash_attention_impl() == FLASH_3:
        attention.restore_flash_attention_impl()


@contextlib.contextmanager
def _only(name: str) -> Iterator[None]:
    """Attention inside is computed by this one of ``KERNELS``."""
    _use_flash_3(name == "flash 3")
    try:
        with sdpa_kernel(KERNELS[name]):
            yield
    finally:
        _use_flash_3(False)


def measure(
    config: ModelConfig, *, rows: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of a forward and a backward pass through one layer's attention, for each of
    ``KERNELS`` that supports the shape and agrees with torch's own; empty if no other does.
    """
    config = config.resolved()
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (
        torch.randn(
            (rows, heads, config.context_length, config.head_dim),
            generator=generator,
            device=device,
        )
        .to(dtype)
        .requires_grad_()
        for heads in (config.n_head, config.n_kv_head, config.n_kv_head, config.n_head)
    )
    grouped = config.n_head != config.n_kv_head
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, config.dropout, True, grouped)
    names = ["flash"]
    if torch.backends.cuda.can_use_cudnn_attention(asked):
        names.append("cudnn")
    if has_flash_3(device) and config.dropout == 0 and dtype != torch.float32:
        names.append("flash 3")

    def run(name: str, dropout: float) -> list[Tensor]:
        with _only(name):
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped
            )
            return [y, *torch.autograd.grad(y, (q, k, v), dy)]

    if names == ["flash"]:
        return {}
    expected, times = run("flash", 0.0), {}
    for name in names:
        try:
            if _agree(run(name, 0.0), expected):
                step = functools.partial(run, name, config.dropout)
                times[name] = _seconds(step, device)
        except (RuntimeError, OSError, ImportError, AttributeError):
            continue  # unsupported shape, or FlashAttention 3 was built for another torch
    return times if len(times) > 1 else {}


def has_flash_3(device: torch.device) -> bool:
    """Whether FlashAttention 3 is installed, and the GPU is one of those that it is for."""
    is_installed = CAN_SWITCH and importlib.util.find_spec(FLASH_3_PACKAGE) is not None
    return is_installed and torch.cuda.get_device_capability(device)[0] == 9


def _agree(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    pairs = zip(one, two, strict=True)
    return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in pairs)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED):
        step()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / TIMED
