"""The self-test of ``gpt doctor``: whether this machine computes what it should, in five seconds.

Cached decoding is compared with the full forward pass, and a product in each weights format with
float64.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from gpt.commands.findings import Finding, note, ok
from gpt.config import ModelConfig, UsageError, Weights
from gpt.device import choose_device
from gpt.generation.inference import prepare_for_inference
from gpt.generation.packed_layers import FEW, PackedLinear
from gpt.model.gpt import GPT

SEED = 0
SMALL: dict[str, Any] = {
    "vocab_size": 256, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 128,
}  # fmt: skip
MODELS = {
    "GPT-2's blocks": ModelConfig(**SMALL),
    "rotary, RMSNorm, gated, grouped queries": ModelConfig(
        **SMALL, position="rotary", norm="rmsnorm", mlp="gated", activation="silu", n_kv_head=2
    ),
}
CHUNKS = (1, 7, 16, 1, 1, 38)
"""Tokens read at a time; their sum is the context."""
LOGITS = 1e-4
"""Largest error of a cached logit, relative to the largest logit."""
ROUNDED: dict[Weights, float] = {
    "float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3, "int8": 1.5e-2, "int4": 0.12,
}  # fmt: skip
"""Largest relative error (root mean square) of a format's matrix."""
PRODUCT: dict[Weights, float] = {
    "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 2e-2, "int4": 2e-2,
}  # fmt: skip
"""Largest relative error of a product with the format's own matrix in float64: the products round
activations to bfloat16 or to 8 bits."""


def self_test() -> list[Finding]:
    """The findings of the test, on the device that ``auto`` chooses."""
    device, start = choose_device("auto"), time.perf_counter()
    generator = torch.get_rng_state()
    try:
        with torch.inference_mode(), _full_precision():
            found = [_tested(f"cached {name}", _cached, c, device) for name, c in MODELS.items()]
            found += [_tested(kind, _products, kind, device) for kind in ROUNDED]
    finally:
        torch.set_rng_state(generator)
    failed = [each for each in found if each.status == "failed"]
    if failed:
        return failed
    took = time.perf_counter() - start
    absent = [each for each in found if each.status == "note"]
    n = len(PRODUCT) - len(absent)
    said = f"cached decoding and products in {n} weights formats are right on {device}"
    return [*absent, ok("self-test", f"{said} ({took:.1f} s)")]


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tested(name: str, test: Callable[..., str], *about: object) -> Finding:
    """The finding of a test that returns what is wrong, or nothing."""
    try:
        wrong = test(*about)
    except UsageError as error:  # a format that the device does not have
        return note("self-test", f"{name}: {error}")
    except RuntimeError as error:
        wrong = f"failed with {str(error).splitlines()[0]}"
    if not wrong:
        return ok("self-test", name)
    what = (
        "results on this machine are wrong: try ATEN_CPU_CAPABILITY=avx2 and CXX=g++, another "
        "version of torch, and then a memory test"
    )
    return Finding("self-test", "failed", f"{name}: {wrong}", what)


def _cached(config: ModelConfig, device: torch.device) -> str:
    torch.manual_seed(SEED)
    model = GPT(config).to(device).eval()
    tokens = torch.randint(config.vocab_size, (2, config.context_length), device=device)
    wanted = model(tokens)
    scale = float(wanted.abs().max())
    for kind, each in {
        "modules": model,
        "kernels": prepare_for_inference(model, "float32"),
    }.items():
        cache = each.new_cache(2)
        parts = [each(part, cache=cache) for part in tokens.split(CHUNKS, dim=1)]
        error = float((torch.cat(parts, dim=1) - wanted).abs().max()) / scale
        if not error < LOGITS:
            return f"logits of the {kind} with a cache differ by {error:.1e} from those without"
    return ""


def _products(kind: Weights, device: torch.device) -> str:
    torch.manual_seed(SEED)
    model = GPT(ModelConfig(**{**SMALL, "n_layer": 1, "vocab_size": 1000, "n_embd": 512})).eval()
    packed = prepare_for_inference(model, kind, device=device)
    head = cast(PackedLinear, packed.head)
    matrix, exact = head.matrix, model.head.weight.double()
    stored = matrix.dense(torch.float32).double().cpu()
    if not (error := _relative(stored, exact)) < ROUNDED[kind]:
        return f"the rounded weights differ by {error:.1e} from the original ones"
    for rows in (1, FEW, 4 * FEW):  # kernels of one row, of few rows, and matrix products
        x = torch.randn(rows, 512)
        y = head(x.to(device, head.wide if device.type == "cuda" else torch.float32))
        error = _relative(y.double().cpu(), x.double() @ stored.T)
        if not error < PRODUCT[kind]:
            return f"a product of {rows} rows differs by {error:.1e} from float64"
    return ""


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
