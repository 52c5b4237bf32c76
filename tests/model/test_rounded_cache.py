"""Keys and values in 8 bits (``stored_as="int8"``): in torch, in the kernels, and in every decoder."""

import dataclasses
import math

import pytest
import torch

from gpt import kernels
from gpt.config import ModelConfig
from gpt.generation.inference import prepare_for_inference
from gpt.model.store import Copied, Store, round_rows
from tests.conftest import make_model
from tests.generation.test_inference import NEEDS_A_COMPILER
from tests.model.test_cache import KINDS, VARIANTS, model_of, some_tokens

LENGTHS = [9, 4, 6]
"""Of a batch's rows."""


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
