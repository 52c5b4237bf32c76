import dataclasses

import pytest
import torch

from gpt.model.gpt import GPT
from gpt.training.activations import checkpoint_activations


def run(config, kind):
    """Gradients, and how often the feed-forward layer and its first product are computed."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(config, dropout=0.2)).train()
    checkpoint_activations(model, kind)
    calls = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    tokens = torch.arange(32).view(2, 16) % 61
    with Products() as products:
        model(tokens).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}, len(calls), products.count


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the products of linear layers."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("addmm", "mm")
        self.count += function._schema.name.removeprefix("aten::") in names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit_with_dropout_too(kind, tiny_config):
    plain, _, _ = run(tiny_config, "none")
    again, _, _ = run(tiny_config, kind)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_full_recomputes_a_block_and_selective_recomputes_no_linear_layer(tiny_config):
    _, once, products = run(tiny_config, "none")
    _, full_calls, full_products = run(tiny_config, "full")
    _, selective_calls, selective_products = run(tiny_config, "selective")
    assert (once, full_calls, selective_calls) == (1, 2, 2)
    assert full_products > products
    assert selective_products == products


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_without_gradients_nothing_is_kept_or_recomputed(kind, tiny_model, tiny_config):
    tokens = torch.arange(16)[None]
    expected = tiny_model(tokens)
    checkpoint_activations(tiny_model, kind)
    with torch.inference_mode():
        cache = tiny_model.new_cache()
        assert torch.equal(tiny_model(tokens), expected)
        torch.testing.assert_close(tiny_model(tokens, cache=cache), expected)
    assert tiny_model.state_dict().keys() == GPT(tiny_config).state_dict().keys()
