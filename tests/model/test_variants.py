"""A variant is an entry of a table: what the tables hold is tested by being there."""

import dataclasses
import itertools
from typing import get_args

import pytest
import torch
from torch import nn

from gpt import config as configs
from gpt.model import block, mlp, norm, position
from gpt.model.gpt import GPT
from gpt.model.initial import normal
from gpt.model.position import Position
from gpt.model.shared import Rotation
from tests.conftest import make_model

TABLES = {
    "position": (position.POSITIONS, configs.PositionScheme),
    "norm": (norm.NORMS, configs.Norm),
    "norm_placement": (block.RESIDUALS, configs.NormPlacement),
    "mlp": (mlp.MLPS, configs.Mlp),
    "activation": (mlp.ACTIVATIONS, configs.Activation),
}
VARIANTS = [(field, name) for field, (table, _) in TABLES.items() for name in table]


@pytest.mark.parametrize("field", TABLES)
def test_the_configurations_names_are_the_tables_keys(field):
    table, names = TABLES[field]
    assert set(get_args(names)) == table.keys()


def law(model):
    """Cached decoding gives the full forward's logits, whatever the chunks and the lengths."""
    context = model.config.context_length
    tokens = torch.randint(model.config.vocab_size, (2, context))
    expected = model(tokens)
    for on_device, sizes in itertools.product(
        (False, True), ([context], [1] * context, [5, 1, 3, context - 9], [3, context - 3])
    ):
        cache = model.new_cache(2, on_device=on_device)
        parts = [model(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)
        cache.truncate([4, 7])  # rows of unlike lengths
        chunk = torch.stack([tokens[0, 4:9], tokens[1, 7:12]])
        got = model(chunk, cache=cache)
        torch.testing.assert_close(got[0], expected[0, 4:9], rtol=0, atol=1e-5)
        torch.testing.assert_close(got[1], expected[1, 7:12], rtol=0, atol=1e-5)


def learns(model):
    """Every parameter has a gradient."""
    model.train()(torch.randint(model.config.vocab_size, (2, 9))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("field", "name"), VARIANTS)
def test_the_cache_law_holds_for_each_variant(field, name, tiny_config):
    with torch.no_grad():
        law(make_model(dataclasses.replace(tiny_config, **{field: name}), seed=1))


@pytest.mark.parametrize(("field", "name"), VARIANTS)
def test_each_variant_learns_in_every_parameter(field, name, tiny_config):
    learns(make_model(dataclasses.replace(tiny_config, **{field: name}), seed=1))


@pytest.mark.parametrize(("field", "name"), VARIANTS)
def test_initialise_reaches_every_parameter(field, name, tiny_config):
    config = dataclasses.replace(tiny_config, **{field: name}, tie_embeddings=False)
    torch.manual_seed(3)
    expected = GPT(config)
    with torch.device("meta"):
        later = GPT(config)
    for model, parts in ((expected, [None]), (later.to_empty(device="cpu"), None)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(4)
        if parts is None:  # child by child, and block by block
            parts = [child for name, child in model.named_children() if name != "blocks"]
            at = [n for n, _ in model.named_children()].index("blocks")
            parts[at:at] = list(model.blocks)
        for part in parts:
            model.initialise(part)
    for (name, one), two in zip(expected.named_parameters(), later.parameters(), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, two), name


def test_parameters_that_nothing_initialises_are_an_error(tiny_model):
    tiny_model.blocks[0].gain = nn.Module()
    tiny_model.blocks[0].gain.register_parameter("weight", nn.Parameter(torch.ones(3)))
    with pytest.raises(TypeError, match=r"Module has parameters and no reset\(\)"):
        tiny_model.initialise()


def test_a_model_has_no_buffers(tiny_model):
    assert list(tiny_model.buffers()) == []


class HalfNorm(nn.Module):
    """A toy: every number is divided by the mean size of its vector, and half of it is kept."""

    def __init__(self, config, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), None

    def forward(self, x):
        return x / (x.abs().mean(dim=-1, keepdim=True) + 1e-5) * self.weight / 2

    def reset(self):
        nn.init.ones_(self.weight)


class Everything(Position):
    """A toy: waves are added, queries and keys are rotated, and far keys count less."""

    def __init__(self, config):
        super().__init__(config)
        self.waves = nn.Linear(1, config.n_embd)
        self.n_head, self.half = config.n_head, config.resolved().head_dim // 2

    def embed(self, x, at):
        return x + self.waves(at[..., None].to(x.dtype) / 8).sin()

    def rotation(self, at, kind):
        angles = at[..., None] * 0.3 ** torch.arange(self.half)
        angles = angles if at.ndim == 1 else angles[:, None]
        return Rotation(angles.cos(), angles.sin())

    def bias(self, at, keys, kind):
        distance = (keys[..., None, :] - at[..., :, None]).clamp(max=0)
        return distance[..., None, :, :] * 0.5 ** torch.arange(self.n_head)[:, None, None]

    def reset(self):
        normal(self.waves)


@pytest.mark.parametrize(
    ("table", "field", "toy"),
    [(norm.NORMS, "norm", HalfNorm), (position.POSITIONS, "position", Everything)],
)
def test_a_variant_from_outside_is_one_entry(table, field, toy, tiny_config, monkeypatch):
    monkeypatch.setattr("gpt.config.model.check", lambda *arguments: None)  # which knows the names
    monkeypatch.setitem(table, "toy", toy)
    model = make_model(dataclasses.replace(tiny_config, **{field: "toy"}), seed=1)
    with torch.no_grad():
        law(model)
    learns(model)
    assert model.parameter_count() > 0
