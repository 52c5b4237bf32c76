"""Keys and values in 8 bits (``stored_as="int8"``), in torch and in the kernels."""

import copy
import statistics

import pytest
import torch

from gpt.config import ModelConfig
from gpt.generation.inference import prepare_for_inference
from gpt.model.store import Copied, Store, round_rows
from tests.conftest import make_model
from tests.model.family import BASE, CONTEXT, KNOWN, config_of, id_of
from tests.model.test_cache import KINDS, VARIANTS, model_of, some_tokens
from tests.model.test_family import NEEDS_A_COMPILER, small


def as_float(k: torch.Tensor) -> torch.Tensor:
    """Keys or values after rounding, in their own dtype."""
    rows, scales = round_rows(k)
    return (rows * scales).to(k.dtype)


def decoded(model, stored_as, *, on_device=False, sizes=(5, 1, 3, 1, 1)):
    """The logits of three rows through a cache: of chunks and tokens, after a truncation, of
    reordered rows, and of copied ones.
    """
    tokens = some_tokens(3, sum(sizes))
    cache = model.new_cache(3, on_device=on_device, stored_as=stored_as)
    logits = [model(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)]
    cache.truncate([8, 7, 9])
    logits += [model(tokens[:, -1:], cache=cache) for _ in range(2)]
    cache.reorder([2, 2, 0])
    logits.append(model(tokens[:, :1], cache=cache))
    wide = cache.expand(1)
    logits.append(model(tokens[:, :1], cache=wide))
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_queries_read_the_rounded_rows_in_every_store(kind, variant, monkeypatch):
    model = model_of(variant)
    got, cache = decoded(model, "int8", on_device=kind)
    assert {cache.layer(i)[0].keys.dtype for i in range(cache.n_layer)} == {torch.int8}
    plain, _ = decoded(model, "float", on_device=kind)
    monkeypatch.setattr(Store, "_stored", lambda self, k, v: (as_float(k), as_float(v)))
    monkeypatch.setattr(Copied, "_stored", lambda self, k, v: (k, v))
    expected, _ = decoded(model, "float", on_device=kind)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert 1e-4 < (got - plain).abs().max() < 0.1 * plain.std()


@NEEDS_A_COMPILER
@pytest.mark.parametrize("names", KNOWN, ids=map(id_of, KNOWN))
@torch.inference_mode()
def test_the_kernels_give_torchs_logits_over_the_same_rows(names):
    prepared = prepare_for_inference(small(config_of(names)), "float32")
    modules = copy.copy(prepared)
    modules.few = 0  # matrix by matrix
    mine, theirs = (prepared.new_cache(2, stored_as="int8") for _ in range(2))
    errors = []
    for token in some_tokens(2, CONTEXT).split(1, dim=1):
        for kind, store in mine.stores.items():  # a last bit may round a number to the next step
            for tensor, other in zip(store.tensors, theirs.stores[kind].tensors, strict=True):
                other.copy_(tensor)
        got, expected = prepared(token, cache=mine), modules(token, cache=theirs)
        errors.append(float((got - expected).norm() / expected.norm()))
    assert prepared._fused(mine, 2) is not None
    assert max(errors) < 0.02
    assert statistics.median(errors) < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_visible(bad):
    row = torch.tensor([[1.0, bad, -3.0, 0.0]])
    rows, scales = round_rows(row)
    assert not (rows * scales).isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-35, 1.0, 3e38])
def test_each_number_is_within_half_a_step_of_its_rows(size):
    x = torch.linspace(-1, 0.9, 333, dtype=torch.float64).mul(size).float()
    rows, scale = round_rows(x)
    assert float(scale) == pytest.approx(float(x.abs().max()) / 127, rel=1e-6, abs=1e-45)
    assert ((rows * scale - x).abs() <= 0.5001 * scale + 1e-45).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_memory_is_its_numbers_and_a_scale(dtype):
    model = make_model(ModelConfig(**BASE | {"n_kv_head": 2}), dtype=dtype)
    caches = {kind: model.new_cache(3, capacity=20, stored_as=kind) for kind in ("float", "int8")}
    rows = 3 * 20 * 3 * 2 * 2  # layers, tokens, rows of the batch, heads, keys and values
    assert caches["float"].nbytes == rows * 16 * dtype.itemsize
    assert caches["int8"].nbytes == rows * (16 + 4)
    wide = caches["int8"].expand(2, capacity=10)
    assert (wide.stored_as, wide.dtype, wide.nbytes) == ("int8", dtype, rows * (16 + 4))
