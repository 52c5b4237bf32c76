import copy
import dataclasses

import pytest
import torch
from torch import nn

from gpt.config import TrainConfig, UsageError, parse
from gpt.training.float8 import FORWARD, GRADIENT, Float8Linear, _rounded, convert, use_float8
from gpt.training.loss import summed_loss
from tests.conftest import make_model

CPU = torch.device("cpu")


def layers():
    """A linear layer, and the same one with float8 products."""
    torch.manual_seed(1)
    exact = nn.Linear(48, 32)
    rounded = copy.deepcopy(exact)
    rounded.__class__ = Float8Linear
    return exact, rounded


def gradients(layer, x, slope, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **({"enabled": False} | autocast)):
        y = layer(x)
    y.backward(slope.to(y.dtype))
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def apart(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def read(x, dtype):
    rounded, scale = _rounded(x, dtype)
    return rounded.double() * scale.double()


def test_the_products_are_those_of_the_rounded_numbers():
    exact, rounded = layers()
    x, slope = torch.randn(5, 16, 48) * 3, torch.randn(5, 16, 32) * 1e-4
    y, of_x, of_weight, of_bias = gradients(rounded, x, slope)
    x8, slope8 = read(x, FORWARD).flatten(0, 1), read(slope, GRADIENT).flatten(0, 1)
    weight8 = read(exact.weight.detach(), FORWARD)
    assert apart(y.flatten(0, 1) - exact.bias.detach(), x8 @ weight8.T) < 1e-5
    assert apart(of_x.flatten(0, 1), slope8 @ weight8) < 1e-5
    assert apart(of_weight, slope8.T @ x8) < 1e-5
    assert apart(of_bias, slope.flatten(0, 1).sum(0)) < 1e-5
    for got, expected, most in zip(
        (y, of_x, of_weight), gradients(exact, x, slope)[:3], (0.04, 0.08, 0.08), strict=True
    ):
        assert 0.001 < apart(got, expected) < most


@pytest.mark.parametrize("largest", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
def test_the_largest_number_becomes_the_largest_of_the_format(dtype, largest):
    x = torch.linspace(-largest, largest / 2, 64).view(8, 8)
    rounded, scale = _rounded(x, dtype)
    assert rounded.double().min() == -torch.finfo(dtype).max
    assert rounded.double().min() * scale == pytest.approx(-largest)
    zeros, _ = _rounded(torch.zeros(2, 2), dtype)
    assert torch.equal(zeros.float(), torch.zeros(2, 2))


def test_autocast_gives_the_dtype_of_the_result_and_weights_keep_theirs():
    _, rounded = layers()
    x, slope = torch.randn(16, 48), torch.randn(16, 32)
    y, of_x, of_weight, _ = gradients(rounded, x, slope, dtype=torch.bfloat16, enabled=True)
    assert [t.dtype for t in (y, of_x, of_weight)] == [torch.bfloat16, torch.float32, torch.float32]


def test_outside_of_training_the_products_are_exact():
    exact, rounded = layers()
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert torch.equal(rounded(x), exact(x))
    assert torch.equal(rounded.eval()(x), exact(x))


def test_the_gradient_of_a_frozen_weight_is_not_computed():
    _, rounded = layers()
    rounded.weight.requires_grad_(False)
    x = torch.randn(16, 48, requires_grad=True)
    rounded(x).sum().backward()
    assert rounded.weight.grad is None
    assert x.grad is not None


def test_blocks_in_float8_learn_as_others_do_and_keep_their_keys(tiny_config):
    config = dataclasses.replace(tiny_config, n_embd=32, n_head=2, context_length=16)
    tokens = torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    ends = []
    for use in (False, True):
        model = make_model(config).train()
        keys = list(model.state_dict())
        if use:
            assert convert(model) == 4 * config.n_layer
        assert list(model.state_dict()) == keys
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            loss = summed_loss(model(tokens[:, :-1]), tokens[:, 1:]) / 32
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(losses)
    exact, rounded = ends
    assert exact[0] == pytest.approx(rounded[0], rel=0.02)
    assert rounded != exact
    assert rounded[-1] < 0.5 * rounded[0]
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.1)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_float8_layer_is_one_graph():
    _, rounded = layers()
    x, slope = torch.randn(16, 48), torch.randn(16, 32)
    expected = gradients(rounded, x, slope)
    rounded.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")
    x = x.requires_grad_()
    y = compiled(x)
    y.backward(slope)
    torch._dynamo.reset()
    gradients_of = rounded.weight.grad, rounded.bias.grad
    for got, wanted in zip((y, x.grad, *gradients_of), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_router_and_its_experts_stay_exact(tiny_config):
    config = dataclasses.replace(tiny_config, n_embd=32, n_head=2, n_expert=16, n_expert_active=2)
    model = make_model(config)
    convert(model)
    block = model.blocks[0]
    assert type(block.mlp.router) is nn.Linear
    assert type(block.mlp.experts[0].up) is nn.Linear
    assert type(block.attn.qkv) is Float8Linear


@pytest.mark.parametrize(
    ("width", "capability", "length", "said"),
    [
        (32, None, 32, "the device is cpu"),
        (32, (8, 0), 32, "needs a GPU of CUDA capability 8.9"),
        (32, (9, 0), 24, "model.context_length is 24, which must be a multiple of 16"),
        (24, (9, 0), 32, "no linear layer of the blocks has sides that are multiples of 16"),
        (32, (9, 0), 32, None),
    ],
)
def test_what_cannot_be_is_said(monkeypatch, tiny_config, width, capability, length, said):
    shape = {"n_embd": width, "n_head": 2, "context_length": length}
    model = make_model(dataclasses.replace(tiny_config, **shape))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = CPU if capability is None else torch.device("cuda")
    if said is None:
        use_float8(model, device=device)
        assert type(model.blocks[0].mlp.up) is Float8Linear
        return
    with pytest.raises(UsageError, match=said):
        use_float8(model, device=device)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.float8", "--objective.kind", "dpo"], "false with objective.kind dpo"),
        (
            ["--training.float8", "--adapter.kind", "lora", "--adapter.base", "int8"],
            "false with adapter.base int8",
        ),
        (
            ["--training.compile", "whole", "--training.window_start", "8"],
            "training.window_start, whose windows grow; use on",
        ),
        (["--training.compile", "whole", "--objective.distill", "x"], "objective.distill; use on"),
        (["--training.compile", "whole", "--objective.kind", "dpo"], "objective.kind dpo; use on"),
    ],
)
def test_float8_and_whole_graphs_are_for_plain_pretraining(words, said):
    with pytest.raises(UsageError, match=f"{words[0][2:]} is (true|whole), and .* {said}"):
        parse(TrainConfig, ["--init", "x", *words], prog="train.py")


def test_a_torch_without_float8_products_is_told(monkeypatch, tiny_model):
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    with pytest.raises(UsageError, match="has no torch.nn.functional.scaled_mm"):
        use_float8(tiny_model, device=torch.device("cuda"))
