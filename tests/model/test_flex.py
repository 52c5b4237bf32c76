"""FlexAttention without its compiler, which on a CPU computes the same formula."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from gpt.config import ModelConfig
from gpt.model import flex, gpt
from gpt.model.gpt import GPT
from gpt.model.kinds import layer_kinds
from tests.conftest import make_model

SHAPE = ModelConfig(
    vocab_size=61, context_length=300, n_layer=2, n_head=4, n_embd=64, attention_softcap=2.0,
    position="rotary",
)  # fmt: skip
CHANGES = [
    {},
    {"attention_softcap": 0.0, "learned_sinks": True},
    {"learned_sinks": True, "n_kv_head": 2},
    {"window": 140, "window_pattern": "LG"},
    {"scale_attention_by_layer": True, "position": "learned"},
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@torch.no_grad()
def test_flex_attention_gives_the_logits_of_the_plain_formula(changes, monkeypatch):
    model = make_model(dataclasses.replace(SHAPE, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_(std=2.0)
    tokens = torch.randint(61, (2, 300), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    calls = []

    def counted(*arguments, **options):
        calls.append(options["block_mask"])
        return flex_attention.flex_attention(*arguments, **options)

    monkeypatch.setattr(gpt, "serves", lambda config, kind, at, **options: True)
    monkeypatch.setattr(flex, "_kernel", lambda: counted)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    if "window" not in changes:
        assert calls[0] is calls[1]  # made once for all layers and forwards
        assert model.new_shared(tokens, None).views[model.kinds[0]].flex is calls[0]
    cache = model.new_cache(2)
    torch.testing.assert_close(model(tokens, cache=cache), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2  # the keys of a cache are read by the plain formula


@pytest.mark.parametrize(
    ("changes", "training", "n_token", "device", "expected"),
    [
        ({}, True, 300, "cuda", True),
        ({}, True, 300, "cpu", False),
        ({}, True, 20, "cuda", False),
        ({"attention_softcap": 0.0}, True, 300, "cuda", False),
        ({"attention_softcap": 0.0, "learned_sinks": True}, False, 300, "cuda", True),
        ({"dropout": 0.1}, True, 300, "cuda", False),
        ({"dropout": 0.1}, False, 300, "cuda", True),
        ({"attention_top_k": 3}, True, 300, "cuda", False),
        ({"position": "alibi"}, True, 300, "cuda", False),
        ({"window": 9}, True, 300, "cuda", True),
        ({"window": 9, "sinks": 2}, True, 300, "cuda", False),
        ({"window_pattern": "S"}, True, 300, "cuda", False),
        ({"n_head": 8}, True, 300, "cuda", False),
    ],
    ids=str,
)
def test_flex_attention_serves_only_what_it_computes(
    changes, training, n_token, device, expected, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = dataclasses.replace(SHAPE, **changes)
    at = SimpleNamespace(device=torch.device(device), shape=(n_token,))
    [kind] = set(layer_kinds(config))
    assert flex.serves(config, kind, at, training=training) == expected
    plain = dataclasses.replace(config, attention_softcap=0.0, learned_sinks=False)
    shown = expected or ("attention_softcap" in changes and device == "cuda")
    assert flex.serves(plain, kind, at, training=training, documents=True) == shown


def test_a_model_on_a_cpu_never_uses_it(monkeypatch):
    monkeypatch.setattr(flex, "_kernel", None)
    GPT(SHAPE)(torch.zeros(1, 300, dtype=torch.int64)).sum().backward()
