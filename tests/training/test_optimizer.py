import dataclasses
import re

import pytest
import torch

from gpt.config import OptimizerConfig, UsageError
from gpt.training.decay import CautiousAdamW
from gpt.training.muon import Muon
from gpt.training.optimizer import (
    clip_gradients,
    gradient_norm,
    make_optimizers,
    roles,
    set_learning_rate,
)
from tests.conftest import make_model


def names_of(model, parameters):
    name = {id(p): n for n, p in model.named_parameters()}
    return {name[id(p)] for p in parameters}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_decay_and_nothing_else_does(kind, tiny_model):
    decayed, plain = set(), set()
    for optimizer in make_optimizers(tiny_model, OptimizerConfig(name=kind, weight_decay=0.3)):
        for group in optimizer.param_groups:
            side = decayed if group["weight_decay"] else plain
            assert group["weight_decay"] in (0, 0.3)
            side |= names_of(tiny_model, group["params"])
    assert decayed == {n for n, p in tiny_model.named_parameters() if p.ndim == 2}
    assert plain == {n for n, p in tiny_model.named_parameters() if p.ndim == 1}


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(tiny_model):
    muon, adamw = make_optimizers(tiny_model, OptimizerConfig(name="muon"))
    assert isinstance(muon, Muon)
    assert names_of(tiny_model, muon.param_groups[0]["params"]) == {
        f"blocks.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    }
    assert names_of(tiny_model, adamw.param_groups[0]["params"]) == {
        "embed.weight",
        "position.weight",
    }


def test_the_heads_matrix_is_an_embedding_and_not_for_muon(tiny_config):
    untied = make_model(dataclasses.replace(tiny_config, tie_embeddings=False))
    assert roles(untied)["head.weight"] == roles(untied)["embed.weight"] == "embedding"
    assert roles(untied)["blocks.0.mlp.up.weight"] == "hidden matrix"
    assert roles(untied)["blocks.0.mlp.up.bias"] == roles(untied)["norm.weight"] == "vector"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parameters_are_left_out_and_do_not_change(kind, tiny_model):
    frozen = {n for n, p in tiny_model.named_parameters() if not n.startswith("blocks.1.attn.")}
    for name in frozen:
        tiny_model.get_parameter(name).requires_grad_(False)
    before = {n: p.detach().clone() for n, p in tiny_model.named_parameters()}
    optimizers = make_optimizers(tiny_model, OptimizerConfig(name=kind))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    taken = set().union(*(names_of(tiny_model, group["params"]) for group in groups))
    assert taken == before.keys() - frozen
    tiny_model(torch.arange(8)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    changed = {n for n, p in tiny_model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == taken


@pytest.mark.parametrize(("role", "kind"), [("vector", torch.optim.AdamW), ("hidden matrix", Muon)])
def test_there_is_no_optimizer_without_parameters(role, kind, tiny_model):
    for name, own in roles(tiny_model).items():
        tiny_model.get_parameter(name).requires_grad_(own == role)
    [only] = make_optimizers(tiny_model, OptimizerConfig(name="muon"))
    assert isinstance(only, kind)


def test_adamw_is_fused_and_has_the_configured_betas(tiny_model):
    [adamw] = make_optimizers(tiny_model, OptimizerConfig(beta1=0.8, beta2=0.97))
    assert all(group["fused"] for group in adamw.param_groups)
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.97)}


def test_the_schedule_scales_each_groups_own_highest_rate(tiny_model):
    config = OptimizerConfig(name="muon", learning_rate=0.004, muon_learning_rate=0.02)
    optimizers = make_optimizers(tiny_model, config)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizers, factor)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == pytest.approx([0.02 * factor, 0.004 * factor, 0.004 * factor])


@pytest.mark.parametrize(("limit", "norm_after"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_bounds_the_norm_over_all_parameters(limit, norm_after):
    model = torch.nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    model[0].grad, model[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    before = gradient_norm(model)
    assert before.item() == pytest.approx(5)
    clip_gradients(model, limit, before)
    norm = torch.cat([p.grad for p in model]).norm().item()
    assert norm == pytest.approx(norm_after, rel=1e-5)


def test_parameters_have_their_own_rates_decays_and_betas(tiny_model):
    config = OptimizerConfig(
        name="muon", learning_rate=0.01, muon_learning_rate=0.1, weight_decay=0.5, beta1=0.8,
        rates=("embed.*=3", "attn.*=0.5"), decays=("embed.*=0", "mlp.*=2"),
        betas=("position.*=0.7,0.99", "*norm.*=0,0.9"), muon_momentum=0.9, cautious_decay=True,
    )  # fmt: skip
    muon, adamw = make_optimizers(tiny_model, config)
    assert muon.cautious
    assert isinstance(adamw, CautiousAdamW)
    found = {}
    for group in (*muon.param_groups, *adamw.param_groups):
        own = group["lr"], group["weight_decay"], group.get("betas", group.get("momentum"))
        found |= dict.fromkeys(names_of(tiny_model, group["params"]), own)
    assert found["embed.weight"] == (pytest.approx(0.03), 0.0, (0.8, 0.95))
    assert found["position.weight"] == (0.01, 0.5, (0.7, 0.99))
    assert found["norm.weight"] == (0.01, 0.0, (0.0, 0.9))
    assert found["blocks.1.attn.qkv.weight"] == (0.05, 0.5, 0.9)
    assert found["blocks.1.mlp.up.weight"] == (0.1, 1.0, 0.9)
    assert found["blocks.1.mlp.up.bias"] == (0.01, 0.0, (0.8, 0.95))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rates": ("embed.*=0",)}, "optimizer.rates has 'embed.*=0', and needs"),
        ({"decays": ("=1",)}, "optimizer.decays has '=1', and needs"),
        ({"decays": ("embed.*=-1",)}, "optimizer.decays has 'embed.*=-1'"),
        ({"betas": ("embed.*=0.9",)}, "needs a pattern and two numbers"),
        ({"betas": ("embed.*=0.9,1",)}, "optimizer.betas has 'embed.*=0.9,1'"),
        ({"betas": ("embed.*=0.9,nan",)}, "optimizer.betas has 'embed.*=0.9,nan'"),
        (
            {"rates": ("a=1", "b=2", "a=3")},
            "optimizer.rates is a=1 b=2 a=3, and has a pattern twice",
        ),
    ],
    ids=str,
)
def test_a_pattern_without_fitting_numbers_is_refused(fields, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"betas": ("attn.qkv.weight=0.8,0.9",)}, {"decays": ("norm.weight=2",)}],
    ids=["Muon has no betas", "vectors do not decay"],
)
def test_a_pattern_without_an_effect_is_refused(fields, tiny_model):
    [field] = fields
    with pytest.raises(UsageError, match=f"optimizer.{field} has .*, which matches none"):
        make_optimizers(tiny_model, OptimizerConfig(name="muon", **fields))


@pytest.mark.parametrize("field", ["rates", "decays", "betas"])
def test_a_pattern_that_matches_nothing_is_refused(field, tiny_model):
    numbers = "0.8,0.9" if field == "betas" else "2"
    with pytest.raises(UsageError, match=f"optimizer.{field} has 'embedding', which matches none"):
        make_optimizers(tiny_model, OptimizerConfig(**{field: (f"embedding={numbers}",)}))
