"""The attention kernels for training on CUDA: cuDNN's or torch's own, chosen by measurement.

The faster one depends on the GPU, the shape and the versions. So each run first times both, forward
and backward, on its own shape. cuDNN's results must also agree with torch's.
"""

import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt.config import ModelConfig
from gpt.model.attend import INFERENCE
from gpt.training.parallel import World

KERNELS = {"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": INFERENCE}
"""The candidates by name. If flash attention does not support a shape, torch uses its next one."""
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
    """Enable cuDNN's attention in this process if it is faster for ``rows`` sequences of the full
    context; ``say`` gets the result. All processes use the main process's measurement.
    """
    if device.type != "cuda":
        return
    times = world.broadcast(lambda: measure(config, rows=rows, device=device, dtype=dtype))
    chosen = min(times, key=lambda name: times[name], default="flash")
    torch.backends.cuda.enable_cudnn_sdp(chosen == "cudnn")
    measured = ", ".join(f"{name} {1000 * seconds:.3f} ms" for name, seconds in times.items())
    reason = f"forward and backward: {measured}" if times else "cuDNN's cannot be used"
    say(f"attention {chosen} ({reason})")


def measure(
    config: ModelConfig, *, rows: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of a forward and a backward pass through one layer's attention, for each of
    ``KERNELS``; empty if cuDNN does not support the shape or disagrees with torch.
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
    if not torch.backends.cuda.can_use_cudnn_attention(asked):
        return {}

    def run(name: str, dropout: float) -> list[Tensor]:
        with sdpa_kernel(KERNELS[name]):
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped
            )
            return [y, *torch.autograd.grad(y, (q, k, v), dy)]

    timed = {name: functools.partial(run, name, config.dropout) for name in KERNELS}
    try:
        if not _agree(run("cudnn", 0.0), run("flash", 0.0)):
            return {}
        return {name: _seconds(step, device) for name, step in timed.items()}
    except RuntimeError:  # cuDNN can fail on shapes that it said it supports
        return {}


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
