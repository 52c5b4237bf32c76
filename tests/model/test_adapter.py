import copy
import itertools

import pytest
import torch

from gpt.config import AdapterConfig, ModelConfig, OptimizerConfig, UsageError
from gpt.generation.frozen import freeze_rounded, round_weights
from gpt.generation.inference import prepare_for_inference
from gpt.model import adapter as adapters
from gpt.model.adapter import adapt, adapter_weights, fingerprint, freeze, merge
from gpt.model.gpt import GPT
from gpt.training.optimizer import make_optimizers

SHAPES = {
    "gpt2": {},
    "llama": {
        "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "n_kv_head": 1, "bias": False,
    },
    "experts": {"n_expert": 3, "n_expert_active": 2, "moe_balance": "bias"},
}  # fmt: skip
ADAPTERS = {
    "attention": {"kind": "lora", "rank": 3},
    "all": {"kind": "lora", "rank": 4, "targets": ("attn.*", "mlp.*"), "rank_stabilised": True},
    "bottleneck": {"kind": "bottleneck", "rank": 5},
}
CASES = [
    (shape, kind)
    for shape, kind in itertools.product(SHAPES, ADAPTERS)
    if (shape, kind) != ("experts", "bottleneck")
]


def new_model(**changes):
    torch.manual_seed(1)
    config = {"vocab_size": 50, "context_length": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return GPT(ModelConfig(**(config | changes))).eval()


def tokens():
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(2))


def learn(model):
    """Give the adapter other weights than those of a new one."""
    with torch.no_grad():
        for p in adapter_weights(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.1)


@torch.no_grad()  # with gradients, other kernels compute what has one: the same, up to rounding
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_a_new_adapter_changes_no_logit_and_no_name(shape, kind):
    model = new_model(**SHAPES[shape])
    plain, names = model(tokens()), set(dict(model.named_parameters()))
    before = fingerprint(model)
    adapt(model, AdapterConfig(**ADAPTERS[kind]))
    assert torch.equal(model(tokens()), plain)
    assert set(dict(model.named_parameters())) - set(adapter_weights(model)) == names
    assert fingerprint(model) == before


@pytest.mark.parametrize(("shape", "kind"), [case for case in CASES if case[1] != "bottleneck"])
def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(shape, kind):
    model = new_model(**SHAPES[shape])
    plain = model(tokens())
    adapt(model, AdapterConfig(**ADAPTERS[kind]))
    learn(model)
    adapted = model(tokens())
    assert (adapted - plain).abs().max() > 1e-2
    with pytest.raises(UsageError, match="merge"):
        prepare_for_inference(model, "float32")
    merge(model)
    assert (model(tokens()) - adapted).abs().max() < 1e-5
    assert not adapter_weights(model)
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [p.requires_grad for p in new_model(**SHAPES[shape]).parameters()]
    prepare_for_inference(model, "float32")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_the_adapter_has_gradients_and_a_place_in_the_optimizer(kind):
    model = new_model().train()
    adapt(model, AdapterConfig(**ADAPTERS[kind], dropout=0.1))
    learn(model)
    model(tokens()).square().mean().backward()
    own = adapter_weights(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(own)
    optimizers = make_optimizers(model, OptimizerConfig())
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in own.values()}


@pytest.mark.parametrize("kind", ["all", "bottleneck"])
def test_the_dropout_of_an_adapter_is_that_of_its_input_in_training_alone(kind, monkeypatch):
    model, seen = new_model(), []
    adapt(model, AdapterConfig(**ADAPTERS[kind], dropout=0.25))
    learn(model)
    plain = model(tokens())
    monkeypatch.setattr(adapters, "dropout", lambda x, p: seen.append(p) or torch.zeros_like(x))
    assert torch.equal(model(tokens()), plain)
    assert not seen
    model.train()(tokens())
    n = sum(name.endswith("adapter_a") for name in adapter_weights(model))
    assert seen == [0.25] * n


def saved_bytes(model):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens()).square().mean()
    total = sum(size for address, size in sizes.items() if address not in weights)
    loss.backward()
    return total + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_an_adapter_keeps_less_memory_for_the_backward_pass_than_full_training():
    model = new_model(mlp="gated", n_inner=256).train()
    full = saved_bytes(model)
    adapted = new_model(mlp="gated", n_inner=256).train()
    adapt(adapted, AdapterConfig(kind="lora", rank=2))
    assert saved_bytes(adapted) < 0.7 * full


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_over_rounded_weights_nothing_of_their_size_is_kept_for_the_backward_pass(weights):
    model = new_model(mlp="gated", n_inner=256).train()
    freeze_rounded(model, weights)
    adapt(model, AdapterConfig(kind="lora", rank=2))
    floats = new_model(mlp="gated", n_inner=256).train()
    adapt(floats, AdapterConfig(kind="lora", rank=2))
    assert saved_bytes(model) <= 1.05 * saved_bytes(floats)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_over_rounded_weights_an_adapter_has_the_gradient_over_the_dequantised_ones(weights, shape):
    gradients = []
    for prepare in (freeze_rounded, round_weights):
        model = new_model(**SHAPES[shape])
        prepare(model, weights)
        torch.manual_seed(5)
        adapt(model, AdapterConfig(**ADAPTERS["all"]))
        learn(model)
        model(tokens()).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_weights(model).items()})
    rounded, dense = gradients
    assert rounded.keys() == dense.keys()
    for name, gradient in dense.items():
        assert (rounded[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_in_bfloat16_products_a_base_in_bfloat16_changes_no_bit():
    found = []
    for is_frozen in (False, True):
        model = new_model(**SHAPES["llama"])
        if is_frozen:
            freeze_rounded(model, "bfloat16")
        torch.manual_seed(5)
        adapt(model, AdapterConfig(**ADAPTERS["all"]))
        learn(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens()).float().square().mean()
        loss.backward()
        found.append([loss, *(p.grad for p in adapter_weights(model).values())])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_a_copy_of_an_adapted_model_is_adapted_too():
    model = new_model()
    adapt(model, AdapterConfig(kind="lora"))
    learn(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(tokens()), model(tokens()))
    merge(other)
    assert adapter_weights(model)


def test_a_pattern_that_matches_no_layer_is_refused():
    with pytest.raises(UsageError, match=r"adapter.targets has 'attention.\*'.*attn.qkv"):
        adapt(new_model(), AdapterConfig(kind="lora", targets=("attention.*",)))


def test_frozen_parameters_are_those_that_the_patterns_name():
    model = new_model()
    freeze(model, ("embed.*", "blocks.0.*", "mlp_norm.*"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n
        for n in dict(model.named_parameters())
        if n.startswith(("embed.", "blocks.0.", "blocks.1.mlp_norm"))
    }
    with pytest.raises(UsageError, match="leaves nothing to train"):
        freeze(new_model(), ("*",))
    with pytest.raises(UsageError, match="matches none of the names"):
        freeze(new_model(), ("wte",))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rates_follow_the_patterns_of_names(name):
    model = new_model()
    config = OptimizerConfig(name=name, rates=("blocks.0.*=0.5", "*.bias=0.1"))
    factors = {}
    names = {id(p): n for n, p in model.named_parameters()}
    plain = {"Muon": config.muon_learning_rate, "AdamW": config.learning_rate}
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            for p in group["params"]:
                factors[names[id(p)]] = group["peak_lr"] / plain[type(optimizer).__name__]
    assert set(factors) == set(names.values())
    for own, factor in factors.items():
        first = own.startswith("blocks.0.")
        assert factor == pytest.approx(0.5 if first else 0.1 if own.endswith(".bias") else 1.0)


@pytest.mark.parametrize("rate", ["embed", "embed.*=", "=1", "embed.*=0", "embed.*=nan"])
def test_a_rate_without_a_pattern_or_a_factor_is_refused(rate):
    with pytest.raises(UsageError, match=r"optimizer.rates"):
        OptimizerConfig(rates=(rate,))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 4}, "adapter.rank is 4, and adapter.kind is none; it needs lora or bottleneck"),
        ({"base": "gguf"}, "adapter.base is gguf, and adapter.kind is none"),
        ({"targets": ("mlp.*",)}, r"adapter.targets is mlp.\*, and adapter.kind is none"),
        ({"kind": "bottleneck", "alpha": 2.0}, "adapter.kind is bottleneck; it needs lora"),
    ],
)
def test_a_setting_that_the_kind_has_no_use_for_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        AdapterConfig(**fields)
