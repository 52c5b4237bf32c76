"""Each technique against an independent reference: the paper's formula, torch, or transformers."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from gpt.config import ModelConfig
from gpt.model import kinds
from gpt.model.attend import attend
from gpt.model.gpt import GPT
from gpt.model.kinds import Kind
from gpt.model.mlp import MLP, GatedMLP
from gpt.model.moe import MoE
from gpt.model.norm import LayerNorm, RMSNorm
from gpt.model.position import POSITIONS, alibi_slopes
from gpt.model.rotary import DynamicRotation, frequencies
from tests.conftest import make_model

TINY = ModelConfig(vocab_size=61, context_length=32, n_layer=2, n_head=4, n_embd=64)


def of(**changes):
    return dataclasses.replace(TINY, **changes)


def exact(**changes):
    """A tiny model in float64."""
    return make_model(of(**changes), seed=1, dtype=torch.float64)


def some(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_tokens(rows, n):
    return torch.randint(61, (rows, n), generator=torch.Generator().manual_seed(0))


def rotation(config, n_token):
    """The rotation of the first tokens."""
    kind = kinds.layer_kinds(config)[0]
    return POSITIONS[config.position](config).rotation(torch.arange(n_token), kind)


# Positions


def test_a_rotary_score_depends_on_the_distance_alone():
    turned = rotation(of(position="rotary"), 20)
    q, k = (some(1, 1, 1, 16, seed=n).expand(1, 1, 20, 16) for n in (0, 1))
    scores = (turned.query(q) @ turned.key(k).transpose(-2, -1))[0, 0]
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_rotary_is_llamas(base):
    q, k = some(2, 4, 20, 16).float(), some(2, 2, 20, 16, seed=1).float()
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_theta": base}
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(20)[None])
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    turned = rotation(of(position="rotary", rotary_base=base), 20)
    torch.testing.assert_close((turned.query(q), turned.key(k)), expected)


def test_quarter_rotary_is_gpt_neoxs():
    q, k = some(2, 2, 20, 32).float(), some(2, 2, 20, 32, seed=1).float()
    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=2, rotary_pct=0.25)
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(q, torch.arange(20)[None])
    assert cos.shape[-1] == 8
    expected = neox.apply_rotary_pos_emb(q, k, cos, sin)
    turned = rotation(of(n_head=2, position="rotary", rotary_fraction=0.25), 20)
    torch.testing.assert_close((turned.query(q), turned.key(k)), expected)


def theirs(kind, *, width, trained, context, base, factor, **more):
    """The frequencies and the attention factor of transformers."""
    parameters = {"rope_type": kind, "rope_theta": base, "factor": factor, **more}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = trained
    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=trained if kind == "dynamic" else context,
        rope_parameters=parameters,
    )
    return config


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(("trained", "factor"), [(32, 2.0), (2048, 4.0), (8192, 8.0)])
@pytest.mark.parametrize(
    ("kind", "mine", "more"),
    [
        ("linear", {}, {}),
        ("yarn", {}, {}),
        (
            "yarn",
            {
                "rotary_high_frequency": 16.0,
                "rotary_low_frequency": 2.0,
                "rotary_temperature": 1.3,
            },
            {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        ),
        ("llama3", {}, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        (
            "llama3",
            {"rotary_low_frequency": 2.0, "rotary_high_frequency": 9.0},
            {"low_freq_factor": 2.0, "high_freq_factor": 9.0},
        ),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(kind, mine, more, width, trained, factor):
    context, base = int(trained * factor), 20_000.0
    reference = theirs(
        kind, width=width, trained=trained, context=context, base=base, factor=factor, **more
    )
    expected, scale = ROPE_INIT_FUNCTIONS[kind](reference, "cpu")
    config = of(
        position="rotary", head_dim=width, context_length=context, rotary_base=base,
        rotary_scaling=kind, rotary_scaling_factor=factor, **mine,
    )  # fmt: skip
    got, temperature = frequencies(config.resolved(), base)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    assert temperature == pytest.approx(scale, rel=1e-12)


def test_yarns_temperature_multiplies_queries_and_keys():
    config = of(position="rotary", rotary_scaling="yarn", rotary_scaling_factor=4.0)
    x = some(1, 1, 9, 16)
    turned = rotation(config, 9)
    temperature = 0.1 * math.log(4) + 1
    for y in (turned.query(x), turned.key(x)):
        torch.testing.assert_close(y.norm(dim=-1), temperature * x.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize(("trained", "factor"), [(12, 2.0), (100, 4.0)])
def test_dynamic_frequencies_are_those_of_transformers_at_each_length(width, trained, factor):
    reference = theirs(
        "dynamic", width=width, trained=trained, context=4 * trained, base=10_000.0, factor=factor
    )
    config = of(
        position="rotary", head_dim=width, rotary_scaling="dynamic_ntk",
        rotary_scaling_factor=factor, rotary_trained_length=trained,
    ).resolved()  # fmt: skip
    at = torch.arange(4 * trained)
    dynamic = DynamicRotation(config, 10_000.0, at, at)
    for length in (1, trained - 1, trained, trained + 1, 2 * trained, 4 * trained):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](reference, "cpu", seq_len=length)
        torch.testing.assert_close(
            dynamic._turns(torch.tensor([length]))[0], expected, rtol=1e-5, atol=0
        )


def test_ntk_is_rotary_with_a_larger_base():
    config = of(position="rotary", rotary_scaling="ntk", rotary_scaling_factor=3.0).resolved()
    plain = of(position="rotary").resolved()
    got, expected = frequencies(config, 100.0)[0], frequencies(plain, 100.0 * 3 ** (16 / 14))[0]
    torch.testing.assert_close(got, expected)
    # the fastest pair stays, and the slowest one is interpolated
    turns = frequencies(plain, 100.0)[0]
    torch.testing.assert_close(got[[0, -1]], turns[[0, -1]] / torch.tensor([1.0, 3.0]))


DYNAMIC = {"position": "rotary", "rotary_scaling": "dynamic_ntk", "rotary_scaling_factor": 2.0}


def test_within_the_trained_length_dynamic_ntk_is_plain_rotary():
    model, tokens = exact(**DYNAMIC, rotary_trained_length=12), some_tokens(2, 20)
    plain = exact(position="rotary")
    torch.testing.assert_close(model(tokens[:, :12]), plain(tokens[:, :12]), rtol=0, atol=1e-6)
    assert (model(tokens)[:, 12:] - plain(tokens)[:, 12:]).abs().amax((0, 2)).min() > 1e-4


def test_beyond_the_trained_length_a_token_is_rotated_by_the_base_of_its_own_length():
    """In one layer; in the others the keys before it have been made by their own lengths."""
    tokens = some_tokens(2, 32)
    got = exact(**DYNAMIC, n_layer=1, rotary_trained_length=12)(tokens)
    for length in (13, 20, 32):
        base = 10_000 * (2 * length / 12 - 1) ** (16 / 14)
        plain = exact(position="rotary", rotary_base=base, n_layer=1)
        expected = plain(tokens[:, :length])[:, -1]
        torch.testing.assert_close(got[:, length - 1], expected, rtol=0, atol=1e-5)


def test_xpos_scores_are_the_papers():
    turned = rotation(of(position="xpos"), 32)
    q, k = some(1, 3, 32, 16), some(1, 3, 32, 16, seed=1)
    got = turned.query(q) @ turned.key(k).transpose(-2, -1)
    pairs = torch.arange(8)
    theta, zeta = 10_000.0 ** (-pairs / 8), (pairs / 8 + 0.4) / 1.4
    distance = torch.arange(32)[:, None, None] - torch.arange(32)[:, None]
    turns = torch.polar(zeta ** (distance / 512), distance * theta)
    q, k = (torch.complex(x[..., :8], x[..., 8:]) for x in (q, k))
    expected = torch.einsum("bhmi,bhni,mni->bhmn", q, k.conj(), turns.to(q.dtype)).real
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_xpos_scores_fall_with_the_distance():
    config = of(position="xpos", context_length=4096)
    turned, plain = rotation(config, 4096), rotation(of(position="rotary"), 4096)
    x = torch.zeros(1, 1, 4096, 16)
    x[..., 7] = 1  # the slowest pair, which hardly turns
    ratio = turned.query(x) @ turned.key(x)[0, 0, 0] / (plain.query(x) @ plain.key(x)[0, 0, 0])
    assert (ratio.diff() < 0).all()
    assert ratio[0, 0, 512].item() == pytest.approx((7 / 8 + 0.4) / 1.4, rel=1e-4)


def test_sinusoidal_positions_are_the_papers_waves():
    embedded = POSITIONS["sinusoidal"](of(position="sinusoidal")).embed(
        torch.zeros(1, 32, 64), torch.arange(32)
    )[0]
    for t in (0, 1, 17, 31):
        for i in range(32):
            angle = t / 10_000 ** (2 * i / 64)
            assert embedded[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert embedded[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_alibis_slopes_are_the_published_ones():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    for n in (1, 2, 3, 6, 8, 12, 16, 20, 112):
        ones = torch.ones(1, 2)
        expected = build_alibi_tensor(ones, n, torch.float32)[:, 0, 1]
        torch.testing.assert_close(torch.tensor(alibi_slopes(n)), expected)


def test_alibi_takes_from_a_score_its_slope_for_each_token_between():
    bias = POSITIONS["alibi"](of(position="alibi")).bias(
        torch.tensor([3, 5]), torch.arange(6), Kind()
    )
    for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        assert bias[head, 0, :4].tolist() == [-3 * slope, -2 * slope, -slope, 0]
        assert bias[head, 1].tolist() == [-n * slope for n in (5, 4, 3, 2, 1, 0)]


# Norms and residuals


def test_the_norms_are_torchs_and_llamas():
    x = 3 * some(2, 5, 64).float() + 1
    weight, bias = some(64).float(), some(64, seed=1).float()
    config = of(norm_eps=1e-3)
    mine, root = LayerNorm(config, 64), RMSNorm(of(norm="rmsnorm", norm_eps=1e-3), 64)
    shifted = RMSNorm(of(norm="rmsnorm", norm_bias="yes", norm_eps=1e-3), 64)
    reference = llama.LlamaRMSNorm(64, eps=1e-3)
    with torch.no_grad():
        for norm in (mine, root, shifted, reference):
            norm.weight.copy_(weight)
        mine.bias.copy_(bias)
        shifted.bias.copy_(bias)
    torch.testing.assert_close(mine(x), F.layer_norm(x, (64,), weight, bias, eps=1e-3))
    torch.testing.assert_close(root(x), reference(x))
    torch.testing.assert_close(shifted(x), reference(x) + bias)
    for norm, plain in (("layernorm", (x - x.mean(-1, keepdim=True))), ("rmsnorm", x)):
        bare = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[norm](
            of(norm=norm, norm_weight=False, norm_eps=1e-3), 64
        )
        assert not list(bare.parameters())
        torch.testing.assert_close(
            bare(x), plain / (plain.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        )


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_pre_and_post_are_torchs_own_layer(placement):
    model = exact(norm_placement=placement, activation="gelu", position="none", n_layer=1)
    block, x = model.blocks[0], some(2, 9, 64)
    layer = nn.TransformerEncoderLayer(
        64, 4, 256, dropout=0, activation="gelu", batch_first=True, norm_first=placement == "pre",
        dtype=torch.float64,
    ).eval()  # fmt: skip
    pairs = {
        layer.self_attn.out_proj: block.attn.out, layer.linear1: block.mlp.up,
        layer.linear2: block.mlp.down, layer.norm1: block.attn_norm, layer.norm2: block.mlp_norm,
    }  # fmt: skip
    for reference, mine in pairs.items():
        reference.load_state_dict(mine.state_dict())
    layer.self_attn.in_proj_weight = block.attn.qkv.weight
    layer.self_attn.in_proj_bias = block.attn.qkv.bias
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    got = block(x, model.new_shared(torch.zeros(2, 9, dtype=torch.int64), None))
    torch.testing.assert_close(got, layer(x, src_mask=mask, is_causal=True))


BY_HAND = {
    "deepnorm": lambda b, attn, x: b.mlp_norm(
        4**0.25 * (y := b.attn_norm(4**0.25 * x + attn(x))) + b.mlp(y)
    ),
    "sandwich": lambda b, attn, x: (
        (y := x + b.attn_out_norm(attn(b.attn_norm(x)))) + b.mlp_out_norm(b.mlp(b.mlp_norm(y)))
    ),
    "parallel": lambda b, attn, x: x + attn(b.attn_norm(x)) + b.mlp(b.mlp_norm(x)),
    "parallel_shared": lambda b, attn, x: x + attn(b.attn_norm(x)) + b.mlp(b.attn_norm(x)),
}


@pytest.mark.parametrize("placement", BY_HAND)
def test_the_residual_stream_adds_up_as_written_by_hand(placement):
    model, tokens = exact(norm_placement=placement), some_tokens(2, 9)
    shared = model.new_shared(tokens, None)
    x = model.embed(tokens) + model.position.weight[:9]
    for block in model.blocks:
        x = BY_HAND[placement](block, lambda x, b=block: b.attn(x, shared), x)
    if placement != "deepnorm":
        x = F.layer_norm(x, (64,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(model(tokens), x @ model.embed.weight.T)


# What a query sees


def by_loops(seen):
    """A rule of a function of two integers."""

    def rule(query, key):
        query, key = torch.broadcast_tensors(query, key)
        pairs = zip(query.flatten().tolist(), key.flatten().tolist(), strict=True)
        return torch.tensor([seen(q, k) for q, k in pairs]).view(query.shape)

    return rule


def drawn(block, number):
    """BigBird's earlier block for a block, by the hash of both."""
    mixed = (block * 0x9E3779B1 + (number + 1) * 0x85EBCA77) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) % 2**32
    return (mixed ^ (mixed >> 13)) % (block + 1)


@functools.cache
def window_by_loops(size, sinks=0):
    return by_loops(lambda q, k: 0 <= k <= q and (k > q - size or k < sinks))


@functools.cache
def blocks_by_loops(size, local, first, random):
    def seen(q, k):
        mine, its = q // size, k // size
        chosen = [drawn(mine, number) for number in range(random)]
        return 0 <= k <= q and (mine - its < local or its < first or its in chosen)

    return by_loops(seen)


SPARSE = {"window_pattern": "S", "sparse_block": 8, "sparse_local": 2, "sparse_random": 2}


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 1}, {"window": 5}, {"window": 130}, {"window": 5, "sinks": 3},
        {"window": 5, "sinks": 140}, {"window": 300, "sinks": 2},
        {"window": 5, "learned_sinks": True, "n_kv_head": 2}, SPARSE,
        SPARSE | {"sparse_global": 0, "sparse_random": 0}, SPARSE | {"sparse_block": 3},
        SPARSE | {"sparse_global": 3, "attention_softcap": 4.0},
        SPARSE | {"sparse_block": 64, "attention_top_k": 4},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("n_token", [20, 301])  # beyond twice 128 attention is computed by blocks
@torch.no_grad()
def test_attention_is_that_under_a_mask_written_as_loops(changes, position, n_token, monkeypatch):
    changes = changes | {"position": position, "context_length": 301, "n_layer": 1}
    model, tokens = exact(**changes), some_tokens(1, n_token)
    got = model(tokens)
    monkeypatch.setattr(kinds, "window", window_by_loops)
    monkeypatch.setattr(kinds, "blocks", blocks_by_loops)
    dense = exact(**changes)
    view = dense.new_shared(tokens, None).views[dense.kinds[0]]
    assert view.blocks is None
    torch.testing.assert_close(got, dense(tokens), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "is_by_blocks"),
    [({"window": 5}, True), ({"window": 140}, True), ({"window": 160}, False), (SPARSE, True)],
)
def test_attention_to_a_small_part_of_a_long_context_is_by_blocks(changes, is_by_blocks):
    model = exact(**changes, position="none", context_length=301)
    view = model.new_shared(some_tokens(1, 301), None).views[model.kinds[0]]
    assert (view.blocks is not None) == is_by_blocks


def test_a_block_draws_earlier_blocks_of_all_sorts():
    draws = {drawn(block, number) / block for block in range(1, 200) for number in range(2)}
    assert min(draws) < 0.1
    assert max(draws) == 1  # its own, which it sees anyway
    assert len(draws) > 100


def test_a_window_of_the_contexts_length_is_full_attention():
    tokens = some_tokens(2, 32)
    for changes in ({}, {"position": "alibi"}, {"learned_sinks": True}):
        assert torch.equal(exact(**changes, window=32)(tokens), exact(**changes)(tokens))


def test_a_pattern_gives_each_layer_its_kind():
    model = exact(
        n_layer=5, window=4, window_pattern="LGS", position="rotary", rotary_base_local=50.0
    )
    assert [block.attn.kind.letter for block in model.blocks] == list("LGSLG")
    assert [kind.window for kind in model.kinds] == [4, None, None]
    assert [kind.rotary_base for kind in model.kinds] == [50.0, 10_000.0, 10_000.0]


# Scores


def scores_of(q, k):
    """Causal, ``[B, H, T, T]``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)


def weighted(weights, v):
    return torch.einsum("bhij,bhjd->bhid", weights, v.repeat_interleave(2, 1))


@pytest.fixture
def qkv():
    return some(2, 4, 7, 8), some(2, 2, 7, 8, seed=1), some(2, 2, 7, 8, seed=2)


def test_a_softcap_bounds_the_scores(qkv):
    q, k, v = qkv
    weights = (1.5 * (scores_of(5 * q, k) / 1.5).tanh()).masked_fill(
        torch.ones(7, 7).triu(1).bool(), -torch.inf
    )
    got = attend(5 * q, k, v, softcap=1.5)
    torch.testing.assert_close(got, weighted(weights.softmax(-1), v))
    exposed = (1.5 * (scores_of(5 * q, k)[..., -1, :] / 1.5).tanh()).softmax(-1)
    one = attend(5 * q[:, :, -1:], k, v, softcap=1.5)
    torch.testing.assert_close(one, weighted(exposed[:, :, None], v))


def test_learned_sinks_are_one_more_column_of_the_softmax(qkv):
    q, k, v = qkv
    sinks = some(4, seed=3)
    column = sinks[None, :, None, None].expand(2, 4, 7, 1)
    weights = torch.cat([column, scores_of(q, k)], dim=-1).softmax(-1)[..., 1:]
    torch.testing.assert_close(attend(q, k, v, learned_sinks=sinks), weighted(weights, v))


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 9])
def test_top_k_is_the_softmax_of_the_best_scores(top_k, qkv):
    q, k, v = qkv
    expected = torch.zeros(2, 4, 7, 7, dtype=torch.float64)
    for place, row in zip(expected.view(-1, 7), scores_of(q, k).view(-1, 7), strict=True):
        best = sorted(range(7), key=lambda j: -row[j])[:top_k]
        place[best] = row[best].softmax(0)
    got = attend(q, k, v, top_k=top_k)
    torch.testing.assert_close(got, weighted(expected, v))
    if top_k >= 7:
        torch.testing.assert_close(got, attend(q, k, v))


def test_hard_attention_has_the_gradient_of_the_softmax(qkv):
    def gradients(**options):
        leaves = [x.clone().requires_grad_() for x in qkv]
        attend(*leaves, **options).backward(some(2, 4, 7, 8, seed=5))
        return [leaf.grad for leaf in leaves]

    for hard, soft in zip(gradients(top_k=1)[:2], gradients()[:2], strict=True):
        torch.testing.assert_close(hard, soft)
    q, k, v = qkv
    best = F.one_hot(scores_of(q, k).argmax(-1), 7).double()
    torch.testing.assert_close(attend(q, k, v, top_k=1), weighted(best, v))
    # values have that of the one that was chosen
    expected = torch.einsum("bhij,bhid->bhjd", best, some(2, 4, 7, 8, seed=5))
    torch.testing.assert_close(gradients(top_k=1)[2], expected.unflatten(1, (2, 2)).sum(2))


# Feed-forward layers and experts


def perturbed(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.double()


def test_a_gated_layer_is_its_formula():
    x = some(2, 5, 64)
    for name, activation in {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}.items():
        mlp = perturbed(GatedMLP(of(mlp="gated", activation=name, n_inner=40), 0))
        gate, up = x @ mlp.gate.weight.T + mlp.gate.bias, x @ mlp.up.weight.T + mlp.up.bias
        expected = (activation(gate) * up) @ mlp.down.weight.T + mlp.down.bias
        torch.testing.assert_close(mlp(x), expected)


def test_squared_relu_is_its_formula():
    x, mlp = some(2, 5, 64), perturbed(MLP(of(activation="relu_squared"), 0))
    inner = (x @ mlp.up.weight.T + mlp.up.bias).clamp(min=0) ** 2
    torch.testing.assert_close(mlp(x), inner @ mlp.down.weight.T + mlp.down.bias)


def moe_of(**changes):
    return perturbed(MoE(of(n_inner=40, **changes), 0))


def test_one_expert_is_a_dense_layer():
    moe, x = moe_of(n_expert=1), some(2, 5, 64)
    torch.testing.assert_close(moe(x), moe.experts[0](x))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_all_experts_active_are_their_weighted_sum(score):
    moe, x = (
        moe_of(n_expert=3, n_expert_active=3, moe_renormalise=True, moe_score=score),
        some(2, 5, 64),
    )
    scores = getattr(x @ moe.router.weight.T, score)(*([-1] if score == "softmax" else []))
    weights = scores / scores.sum(-1, keepdim=True)
    expected = sum(weights[..., [e]] * expert(x) for e, expert in enumerate(moe.experts))
    torch.testing.assert_close(moe(x), expected)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_token_goes_through_its_best_experts_and_the_shared_ones(renormalise):
    moe, x = (
        moe_of(n_expert=4, n_expert_active=2, moe_renormalise=renormalise, moe_shared=2),
        some(1, 6, 64),
    )
    for t, probabilities in enumerate((x[0] @ moe.router.weight.T).softmax(-1)):
        weights, best = probabilities.sort(descending=True)
        total = weights[:2].sum() if renormalise else 1
        expected = sum(weights[n] / total * moe.experts[best[n]](x[0, t]) for n in range(2))
        expected = expected + sum(expert(x[0, t]) for expert in moe.shared)
        torch.testing.assert_close(moe(x)[0, t], expected)


def test_the_balancing_losses_are_those_of_transformers():
    x = some(2, 15, 64)
    options = {"n_expert": 4, "moe_balance_weight": 0.3}
    for k in (1, 2, 3):
        moe = moe_of(**options, n_expert_active=k, moe_balance="mixtral").train()
        moe(x)
        logits = (x @ moe.router.weight.T).flatten(0, 1)
        expected = 0.3 * load_balancing_loss_func((logits,), 4, k)
        torch.testing.assert_close(moe.loss, expected, check_dtype=False, rtol=1e-6, atol=0)
    moe = moe_of(**options, moe_balance="switch", moe_z_weight=0.2).train()
    moe(x)
    logits = (x @ moe.router.weight.T).view(1, 30, 4)
    balance = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    expected = 0.3 * balance + 0.2 * switch.router_z_loss_func(logits)
    torch.testing.assert_close(moe.loss, expected, check_dtype=False, rtol=1e-6, atol=0)


def one_hot_router(moe, chosen, second=None):
    """Inputs by which tokens choose these experts, and ``second`` after them."""
    x = torch.zeros(1, len(chosen), 64, dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, : moe.config.n_expert] = torch.eye(moe.config.n_expert)
    x[0, range(len(chosen)), chosen] = 2
    if second is not None:
        x[0, range(len(chosen)), second] = 1
    return x


def test_tokens_beyond_an_experts_capacity_skip_it_in_training_alone():
    moe = moe_of(n_expert=2, moe_capacity=1.0).eval()
    x = one_hot_router(moe, [0, 0, 0, 1, 0, 1])  # room for 3 of 6 tokens in each of 2 experts
    whole = moe(x)
    assert (whole.abs().amax(-1) > 0).all()
    got = moe.train()(x)
    assert (got.abs().amax(-1) > 0)[0].tolist() == [True, True, True, True, False, True]
    torch.testing.assert_close(got[0, [0, 1, 2, 3, 5]], whole[0, [0, 1, 2, 3, 5]])


def test_first_choices_have_room_before_second_ones():
    moe = moe_of(n_expert=3, n_expert_active=2, moe_capacity=0.75)
    chosen, second = [1, 1, 0, 2], [0, 0, 1, 0]  # room for 2 of 8 choices in each of 3 experts
    x = one_hot_router(moe, chosen, second)
    best = moe._logits(x[0]).topk(2).indices
    assert best.tolist() == [list(pair) for pair in zip(chosen, second, strict=True)]
    # expert 0: token 2 first, then token 0; expert 1: tokens 0 and 1; expert 2: token 3
    kept = [[True, True], [True, False], [True, False], [True, False]]
    assert moe._in_capacity(best).tolist() == kept


def test_a_bias_moves_tokens_to_experts_that_have_few_and_weighs_nothing():
    moe = moe_of(n_expert=3, moe_balance="bias", moe_balance_weight=0.6).train()
    nn.init.zeros_(moe.preference)
    x = one_hot_router(moe, [0, 0, 0, 1])
    before = moe(x)
    assert moe.load.tolist() == [3, 1, 0]
    moe.rebalance(moe.load)
    assert moe.load is None
    # an equal share is 4 / 3
    assert moe.preference.tolist() == pytest.approx([-0.6, 0.6, 0.6])
    after = moe(x)
    assert moe.load.tolist() == [0, 4, 0]
    torch.testing.assert_close(after[0, 3], before[0, 3])  # its expert, with its old weight
    scores = (x[0, 0] @ moe.router.weight.T).softmax(-1)
    torch.testing.assert_close(after[0, 0], scores[1] * moe.experts[1](x[0, 0]))


# A pointer


def test_a_pointer_mixes_the_vocabulary_with_the_tokens_of_the_context():
    model, tokens = exact(copy="pointer"), some_tokens(1, 12) % 5  # each token many times
    got = model(tokens)[0].exp()
    plain = exact()
    plain.load_state_dict(model.state_dict(), strict=False)
    states = plain.features(tokens)[0]
    vocabulary = (states @ model.embed.weight.T).softmax(-1)
    query = (states @ model.pointer.query.weight.T + model.pointer.query.bias).tanh()
    for t in range(12):
        scores = [query[t] @ states[s] for s in range(t + 1)] + [query[t] @ model.pointer.sentinel]
        weights = torch.stack(scores).softmax(0)
        expected = weights[-1] * vocabulary[t]
        for s in range(t + 1):
            expected[tokens[0, s]] += weights[s]
        torch.testing.assert_close(got[t], expected)
        assert expected.sum().item() == pytest.approx(1)


# Initial weights


@pytest.mark.parametrize("scheme", ["gpt2", "depth", "zero", "deepnorm"])
def test_initial_weights_have_the_documented_deviations(scheme):
    torch.manual_seed(0)
    config = of(initial=scheme, n_embd=256, n_layer=3, mlp="gated", n_kv_head=2)
    model = GPT(config)
    for layer, block in enumerate(model.blocks):
        out = {
            "gpt2": 0.02 / math.sqrt(6), "depth": 0.02 / math.sqrt(2 * (layer + 1)), "zero": 0.0,
        }  # fmt: skip
        q, k, v = block.attn.qkv.weight.split([256, 128, 128])
        for matrix, role in (
            (q, "scores"), (k, "scores"), (v, "value"), (block.attn.out.weight, "out"),
            (block.mlp.up.weight, "inner"), (block.mlp.gate.weight, "inner"),
            (block.mlp.down.weight, "out"),
        ):  # fmt: skip
            if scheme == "deepnorm":
                xavier = math.sqrt(2 / sum(matrix.shape))
                std = xavier if role == "scores" else xavier * 24**-0.25
            else:
                std = out[scheme] if role == "out" else 0.02
            assert matrix.std().item() == pytest.approx(std, rel=0.03)
            assert abs(matrix.mean().item()) <= 0.02 * std
        assert not block.attn.qkv.bias.any()
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_deepnorm_has_its_constants():
    model = GPT(of(norm_placement="deepnorm", n_layer=18))
    assert model.config.resolved().initial == "deepnorm"
    assert model.blocks[0].alpha == pytest.approx(36**0.25)  # 2.449 of a decoder of 18 layers


# Value embeddings, skips, and narrower windows


def test_value_embeddings_are_added_to_the_values_of_their_layers():
    model = exact(value_embeddings=2, n_layer=4)
    tables = [block.attn.values for block in model.blocks]
    assert [table is not None for table in tables] == [False, True, False, True]
    tokens, seen = some_tokens(2, 9), []
    plain = exact(n_layer=4)
    plain.load_state_dict(model.state_dict(), strict=False)
    for block in plain.blocks:
        block.attn.qkv.register_forward_hook(
            lambda layer, inputs, out: torch.cat(
                [out[..., :128], out[..., 128:] + seen.pop(0)], dim=-1
            )
        )
    zero = torch.zeros(2, 9, 64, dtype=torch.float64)
    seen[:] = [zero if table is None else table.weight[tokens] for table in tables]
    torch.testing.assert_close(model(tokens), plain(tokens))


@pytest.mark.parametrize("n_layer", [1, 4, 5])
def test_skips_are_their_formula(n_layer):
    model = exact(skip_embedding=True, skip_layers=True, n_layer=n_layer)
    tokens = some_tokens(2, 9)
    shared = model.new_shared(tokens, None)
    first = model.embed_tokens(tokens, shared.at)
    x, outputs, skips = first, [], model.skips
    for layer, block in enumerate(model.blocks):
        x = skips.stream[layer] * x + skips.start[layer] * first
        partner = n_layer - 1 - layer
        if partner < n_layer // 2:
            x = x + skips.across[partner] * outputs[partner]
        x = block(x, shared)
        outputs.append(x)
    torch.testing.assert_close(model.features(tokens), model.norm(x))


def test_new_skips_leave_the_model_as_it_is():
    torch.manual_seed(0)
    plain = GPT(of())
    torch.manual_seed(0)
    model = GPT(of(skip_embedding=True, skip_layers=True))
    tokens = some_tokens(2, 9)
    assert torch.equal(model(tokens), plain(tokens))


def test_the_root_soft_cap_is_its_formula():
    model, tokens = exact(logit_softcap=15.0, logit_softcap_form="root"), some_tokens(2, 9)
    with torch.no_grad():
        model.head.weight.mul_(20)
    features = model.features(tokens)
    z = features @ model.head.weight.T
    assert z.abs().max() > 15
    torch.testing.assert_close(model.logits(features), 15 * z / (z**2 + 225).sqrt())


def test_a_limit_narrows_attention_windows_in_training_alone():
    tokens, model = some_tokens(2, 32), exact(position="rotary")
    wide = model(tokens)
    model.window_limit = 5
    assert torch.equal(model(tokens), wide)  # in evaluation mode
    got = model.train()(tokens)
    torch.testing.assert_close(model(tokens, cache=model.new_cache(2)), wide)
    narrow = exact(position="rotary", window=5)
    narrow.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, narrow(tokens))
    assert not torch.allclose(got, wide)


def test_no_limit_changes_no_kind():
    for kind in kinds.layer_kinds(of(window=6, window_pattern="LGS", n_layer=3)):
        assert kinds.narrowed(kind, 0) is kind
    local, full, sparse = kinds.layer_kinds(of(window=6, window_pattern="LGS", n_layer=3))
    assert kinds.narrowed(local, 8) is local
    assert kinds.narrowed(sparse, 2) is sparse
    assert [kinds.narrowed(kind, 4).window for kind in (local, full)] == [4, 4]
