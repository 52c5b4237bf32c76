import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import training_kernels
from gpt.config import Activation, ModelConfig
from gpt.model.dropout import Dropout
from gpt.model.gpt import GPT, parameter_count
from gpt.model.mlp import ACTIVATIONS
from gpt.model.surgery import crop_context, extend_context, resize_vocabulary, set_dropout
from tests.conftest import make_model

HF_NAMES = {
    "embed": "transformer.wte",
    "position": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
HF_ACTIVATIONS = {"gelu_tanh": "gelu_new"} | {n: n for n in ("gelu", "relu", "silu", "tanh")}


def with_hugging_face_weights(config: ModelConfig, seed: int = 0) -> tuple[GPT, GPT2LMHeadModel]:
    """A random GPT-2 of transformers, and this project's model with its weights."""
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            layer_norm_epsilon=config.norm_eps,
            n_inner=config.n_inner or None,
            activation_function=HF_ACTIVATIONS[config.activation],
            scale_attn_weights=config.scale_attention,
            scale_attn_by_inverse_layer_idx=config.scale_attention_by_layer,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        theirs.transformer.wpe.weight.mul_(10)  # so that the likeliest tokens vary
        theirs.transformer.ln_f.bias.zero_()
    ours = GPT(config)
    state = theirs.state_dict()
    weights = {}
    for name, parameter in ours.named_parameters():
        module, kind = name.rsplit(".", 1)
        if module.startswith("blocks."):
            _, layer, part = module.split(".", 2)
            source = state[f"transformer.h.{layer}.{HF_NAMES[part]}.{kind}"]
            is_matrix = part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down") and kind == "weight"
            weights[name] = source.T if is_matrix else source
        else:
            weights[name] = state[f"{HF_NAMES[module]}.{kind}"]
        assert weights[name].shape == parameter.shape
    ours.load_state_dict(weights, strict=False)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_embeddings": False, "norm_eps": 0.1},
        {"scale_attention": False},
        {"scale_attention_by_layer": True},
        {"n_inner": 40, "activation": "gelu"},
        *({"activation": name} for name in ("relu", "silu", "tanh")),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_the_logits_and_gradients_are_those_of_hugging_faces_gpt2(settings):
    config = ModelConfig(
        vocab_size=97, context_length=24, n_layer=3, n_head=4, n_embd=48, **settings
    )
    ours, theirs = with_hugging_face_weights(config)
    ours, theirs = ours.double(), theirs.double()
    tokens = torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(1))
    mine, its = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)
    F.cross_entropy(mine[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(its[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    down = ours.blocks[0].mlp.down.weight.grad
    torch.testing.assert_close(down, theirs.transformer.h[0].mlp.c_proj.weight.grad.T)
    torch.testing.assert_close(ours.embed.weight.grad, theirs.transformer.wte.weight.grad)


def test_the_default_configuration_is_gpt2():
    with torch.device("meta"):
        model = GPT(ModelConfig())
    assert model.parameter_count() == 124_439_808  # as transformers counts openai-community/gpt2
    assert model.parameter_count(embeddings=False) == 124_439_808 - (50_257 + 1_024) * 768


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_counts_a_tied_head_once(tied, tiny_config):
    config = dataclasses.replace(tiny_config, tie_embeddings=tied)
    model = GPT(config)
    table = config.vocab_size * config.n_embd
    positions = config.context_length * config.n_embd
    tables = table * (1 if tied else 2) + positions
    assert model.parameter_count() - model.parameter_count(embeddings=False) == tables
    assert (model.head.weight is model.embed.weight) == tied


@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_a_shapes_parameters_are_counted_without_building_it(n_layer, tiny_config):
    config = dataclasses.replace(tiny_config, n_layer=n_layer)
    assert parameter_count(config) == GPT(config).parameter_count()
    giant = dataclasses.replace(config, n_layer=10**9)
    assert parameter_count(giant) > 10**9 * tiny_config.n_embd**2
    assert parameter_count(dataclasses.replace(config, vocab_size=10**18)) == 2**63


def test_nothing_leaks_from_the_future(tiny_model):
    tokens = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(0))
    logits = tiny_model(tokens)
    for position in range(15):
        changed = tokens.clone()
        changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % 61
        torch.testing.assert_close(
            tiny_model(changed)[:, : position + 1], logits[:, : position + 1], rtol=0, atol=1e-6
        )


def test_every_past_token_matters(tiny_model):
    tokens = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(0))
    logits = tiny_model(tokens)[:, -1]
    for position in range(16):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 61
        assert not torch.allclose(tiny_model(changed)[:, -1], logits, atol=1e-3)


def test_last_only_gives_the_last_positions_logits(tiny_model):
    tokens = torch.randint(61, (2, 9))
    last = tiny_model(tokens, last_only=True)
    assert last.shape == (2, 1, 61)
    torch.testing.assert_close(last, tiny_model(tokens)[:, -1:])


def test_a_sequence_longer_than_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"17 tokens are longer .* context_length \(16\)"):
        tiny_model(torch.zeros(1, 17, dtype=torch.int64))


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=1000, context_length=256, n_layer=8, n_head=4, n_embd=256))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith(("attn.out", "mlp.down"))
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(module.weight.mean().item()) < 0.001
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_weights_drawn_part_by_part_are_those_drawn_at_once(tiny_config):
    torch.manual_seed(0)
    whole, parts = GPT(tiny_config), GPT(dataclasses.replace(tiny_config))
    torch.manual_seed(0)
    for name, part in parts.named_children():
        for child in part if name == "blocks" else [part]:
            parts.initialise(child)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, parts.get_parameter(name)), name


@pytest.mark.parametrize("field", ["vocab_size", "context_length"])
def test_one_token_and_one_position_are_the_least(field, tiny_config):
    model = GPT(dataclasses.replace(tiny_config, **{field: 1}))
    assert model(torch.zeros(2, 1, dtype=torch.int64)).shape == (2, 1, model.config.vocab_size)
    with pytest.raises(ValueError, match=f"model.{field} is 0, and a model needs at least 1"):
        GPT(dataclasses.replace(tiny_config, **{field: 0}))


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=500, context_length=32, n_layer=2, n_head=2, n_embd=64))
    tokens = torch.randint(500, (8, 32))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), torch.randint(500, (8 * 32,)))
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)


@pytest.mark.parametrize("by_kernels", [False, True], ids=["operators", "kernels"])
def test_dropout_is_where_gpt2_has_it(by_kernels, tiny_config, monkeypatch):
    if by_kernels and training_kernels.library() is None:
        pytest.skip("no C++ compiler for the kernels")
    model = GPT(dataclasses.replace(tiny_config, dropout=0.3)).train()
    calls = []

    def record(x, p):
        calls.append((tuple(x.shape), p))
        return x

    def attended(q, k, v, *, p, scale):
        record(q @ k.mT, p)
        return v

    monkeypatch.setattr("gpt.model.dropout.dropout", record)
    monkeypatch.setattr("gpt.model.attend.drop", record)
    kernels = "gpt.training_kernels"
    monkeypatch.setattr(f"{kernels}.takes", lambda *tensors: by_kernels)
    monkeypatch.setattr(f"{kernels}.add_dropped", lambda x, y, p: x + record(y, p))
    monkeypatch.setattr(f"{kernels}.causal_attention", attended)
    model(torch.zeros(2, 5, dtype=torch.int64))
    stream, probabilities = ((2, 5, 32), 0.3), ((2, 4, 5, 5), 0.3)
    assert calls == [stream] + 2 * [probabilities, stream, stream]


def test_dropout_is_off_in_evaluation_and_in_training_each_forward_draws_anew(tiny_config):
    model = GPT(dataclasses.replace(tiny_config, dropout=0.3))
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    assert not torch.equal(model.train()(tokens), model(tokens))
    without = GPT(tiny_config)
    without.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens), without.eval()(tokens))


def test_a_model_without_biases_has_none(tiny_config):
    model = GPT(dataclasses.replace(tiny_config, bias=False))
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 61)


def test_the_configurations_activations_are_the_tables():
    assert set(get_args(Activation)) == set(ACTIVATIONS)


def test_flops_per_token_match_a_count_by_hand():
    config = ModelConfig(vocab_size=10, context_length=8, n_layer=2, n_head=2, n_embd=4, bias=False)
    matrices = 2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) + 10 * 4
    norms = 5 * 4
    attention = 2 * 2 * 3 * 2 * 8 * 4  # 2 products of 2 T C operations, thrice, in 2 layers
    assert make_model(config).flops_per_token() == 6 * (matrices + norms) + attention


def test_flops_per_token_of_gpt2_are_those_of_the_palm_formula():
    with torch.device("meta"):
        model = GPT(ModelConfig())
    blocks_norms_and_head = 124_439_808 - 1024 * 768
    assert model.flops_per_token() == 6 * blocks_norms_and_head + 12 * 12 * 768 * 1024


def test_flops_per_token_count_the_keys_of_a_window_and_the_experts_of_a_token():
    wide = ModelConfig(vocab_size=10, context_length=64, n_layer=2, n_head=2, n_embd=4)
    near = dataclasses.replace(wide, window=8, window_pattern="GL")
    keys = 12 * (64 - 8) * 4
    assert GPT(wide).flops_per_token() - GPT(near).flops_per_token() == keys
    few, many = (dataclasses.replace(wide, n_expert=n, n_expert_active=2) for n in (4, 8))
    routers = 6 * 2 * 4 * 4
    assert GPT(many).flops_per_token() - GPT(few).flops_per_token() == routers


def test_a_cropped_model_is_the_model_on_shorter_texts(tiny_model):
    tokens = torch.randint(61, (2, 9))
    expected = tiny_model(tokens)
    crop_context(tiny_model, 9)
    assert torch.equal(tiny_model(tokens), expected)
    assert tiny_model.new_cache().capacity == 9
    with pytest.raises(ValueError, match="10 tokens are longer"):
        tiny_model(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="context_length is 10, and must be from 1"):
        crop_context(tiny_model, 10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("position", "rotary"),
    [
        ("rotary", {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0}),
        ("rotary", {"rotary_scaling": "dynamic_ntk", "rotary_scaling_factor": 4.0}),
        ("xpos", {"rotary_scaling": "linear", "rotary_scaling_factor": 4.0}),
        ("rotary", {"rotary_base": 500.0}),
        ("alibi", {}),
        ("sinusoidal", {}),
        ("none", {}),
    ],
)
def test_an_extended_model_is_the_new_shape_with_the_old_weights(position, rotary, tiny_config):
    shape = {"position": position, "window": 5, "window_pattern": "GL"}
    model = make_model(dataclasses.replace(tiny_config, **shape))
    weights = model.state_dict()
    extend_context(model, 64, **rotary)
    trained = {"rotary_trained_length": 16} if "rotary_scaling" in rotary else {}
    config = dataclasses.replace(tiny_config, **shape, **rotary, **trained, context_length=64)
    assert model.config == config
    new = GPT(config).eval()
    new.load_state_dict(weights)
    tokens = torch.randint(61, (2, 64))
    assert torch.equal(model(tokens), new(tokens))
    cache = model.new_cache(2)
    parts = [model(tokens[:, :20], cache=cache), model(tokens[:, 20:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), new(tokens), rtol=1e-4, atol=1e-4)


def test_learned_positions_are_not_extended(tiny_model):
    with pytest.raises(ValueError, match="has 16 positions, which are learned"):
        extend_context(tiny_model, 17)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_and_leave_the_others_logits(tied, tiny_config):
    model = make_model(dataclasses.replace(tiny_config, tie_embeddings=tied))
    tokens = torch.randint(50, (2, 9))
    before, mean = model(tokens), model.embed.weight.mean(0)
    resize_vocabulary(model, 70)
    after = model(tokens)
    torch.testing.assert_close(after[..., :61], before)
    torch.testing.assert_close(after[..., 61:], before.mean(-1, keepdim=True).expand(-1, -1, 9))
    torch.testing.assert_close(model.embed.weight[65], mean)
    assert (model.head.weight is model.embed.weight) == tied
    resize_vocabulary(model, 50)
    torch.testing.assert_close(model(tokens), before[..., :50])
    assert model.config.vocab_size == model.head.out_features == 50


def test_dropout_may_be_changed_everywhere(tiny_model):
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    tiny_model.train()
    assert torch.equal(tiny_model(tokens), tiny_model(tokens))
    set_dropout(tiny_model, 0.5)
    assert {m.p for m in tiny_model.modules() if isinstance(m, Dropout)} == {0.5}
    assert {block.attn.dropout for block in tiny_model.blocks} == {0.5}
    assert not torch.equal(tiny_model(tokens), tiny_model(tokens))
    set_dropout(tiny_model, 0.0)
    assert torch.equal(tiny_model(tokens), tiny_model(tokens))
