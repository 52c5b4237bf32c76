"""Claims about every model of tests/model/family.py: what holds for one combination of techniques
holds for all.
"""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gpt import checkpoint as checkpoints
from gpt import kernels
from gpt.generation.fused import Fused
from gpt.generation.inference import prepare_for_inference
from gpt.model.gpt import GPT, parameter_count
from gpt.model.moe import MoE, auxiliary_loss
from gpt.model.surgery import crop_context, resize_vocabulary
from tests.conftest import make_model
from tests.model.family import CONTEXT, KNOWN, PARTS, ROWS, config_of, id_of, is_possible

V = 61
NEEDS_A_COMPILER = pytest.mark.skipif(
    kernels.library() is None, reason=f"no kernels: {kernels.problem()}"
)
FORMATS = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05, "int4": 0.05}
"""The root mean square error of a format's arithmetic, in parts of the logits' deviation. Both
formats of integers round activations to 8 bits; over these models, the median is 0.008, the largest
0.032.
"""


def over(rows):
    """For claims that take long, or are of some rows alone."""
    return pytest.mark.parametrize("row", rows, ids=map(id_of, rows), indirect=True)


@pytest.fixture(scope="module", params=ROWS, ids=map(id_of, ROWS))
def row(request):
    return request.param


@pytest.fixture(scope="module")
def config(row):
    return config_of(row)


@pytest.fixture(scope="module")
def model(config):
    """In float64 and evaluation mode, with weights far from their defaults."""
    return make_model(config, seed=1, dtype=torch.float64)


def some_tokens(rows, n, seed=0):
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(seed))


def assert_close(got, expected, tolerance=1e-9):
    within = tolerance * max(1, float(expected.abs().max())) if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=0, atol=within)


def loss_of(model, tokens):
    """In training: of the next tokens, and what spreads tokens over experts."""
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    auxiliary = auxiliary_loss(model)
    return loss if auxiliary is None else loss + auxiliary


@torch.no_grad()
def test_nothing_leaks_from_the_future(model):
    tokens = some_tokens(1, CONTEXT)
    changed = tokens.repeat(CONTEXT, 1)  # row t has another token t
    changed.diagonal().add_(1).remainder_(V)
    before, after = model(tokens)[0], model(changed)
    for t in range(CONTEXT):
        assert_close(after[t, :t], before[:t])
        assert (after[t, t] - before[t]).abs().max() > 1e-6


@torch.no_grad()
def law(model, n_token=CONTEXT, spare=4, chunkings=None):
    """Cached decoding gives the full forward's logits, whatever the chunks and the lengths, also
    where rings have been overwritten, after truncation, and of rows that were copied and moved.
    """
    chunkings = chunkings or ([CONTEXT], [1] * CONTEXT, [5, 1, 3, 15], [3, 21])
    tokens = some_tokens(2, n_token)
    expected = model(tokens)
    assert expected.isfinite().all()
    with mock.patch("gpt.model.store.SPARE", spare):
        for on_device, sizes in itertools.product((False, True), chunkings):
            cache = model.new_cache(2, on_device=on_device)
            parts = [model(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)]
            assert_close(torch.cat(parts, dim=1), expected)
            kept = [n_token - 3, n_token - 2]  # as far as a ring of 4 spare tokens goes back
            cache.truncate(kept)
            wide = cache.expand(2)
            wide.reorder([3, 0, 1])
            new = torch.stack([tokens[b, kept[b] : kept[b] + 2] for b in (1, 0, 0)])
            for b, got in zip((1, 0, 0), model(new, cache=wide), strict=True):
                assert_close(got, expected[b, kept[b] : kept[b] + 2])


@torch.no_grad()
def ragged(model):
    """The law for rows of unlike lengths, with padding behind the shorter ones."""
    tokens = some_tokens(2, CONTEXT)
    expected = model(tokens)
    with mock.patch("gpt.model.store.SPARE", 4):
        for on_device in (False, True):
            cache = model.new_cache(2, on_device=on_device)
            at = [0, 0]
            for valid in ([7, 2], [1, 1], [0, 6], [9, 1], [1, 1], [1, 6], [4, 0]):
                padded = torch.full((2, max(valid)), V - 1)
                for b, n in enumerate(valid):
                    padded[b, :n] = tokens[b, at[b] : at[b] + n]
                logits = model(padded, cache=cache, valid=valid)
                for b, n in enumerate(valid):
                    assert_close(logits[b, :n], expected[b, at[b] : at[b] + n])
                    at[b] += n
                assert cache.lengths == at


def test_cached_decoding_gives_the_full_forwards_logits(model):
    law(model)


def test_rows_of_unlike_lengths_give_the_full_forwards_logits(model):
    ragged(model)


WITH_RINGS = [row for row in ROWS if "L" in config_of(row).layer_pattern()]


@over(WITH_RINGS[::2])  # 100 tokens one at a time take long
def test_the_law_holds_past_the_end_of_a_whole_ring(row):
    model = make_model(config_of(row, context_length=100), seed=1, dtype=torch.float64)
    sizes = {store.size for store in model.new_cache().stores.values()}
    assert min(sizes) < 90  # or nothing is overwritten
    law(model, 100, spare=64, chunkings=([80, 4, 16], [70, *[1] * 30]))


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({part: st.sampled_from([*names]) for part, names in PARTS.items()}))
def test_the_law_holds_for_combinations_drawn_at_random(row):
    row = {part: row[part] for part in PARTS}
    assume(is_possible(list(row.values())))
    model = make_model(config_of(row), seed=1, dtype=torch.float64)
    law(model)
    ragged(model)


def is_discrete(config):
    """Whether a rounding may change a choice, and the choice the logits."""
    return config.attention_top_k > 0 or config.n_expert > 0


def small(config):
    """A model whose logits are not much larger than their rounding."""
    model = make_model(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05 / 0.3)
    return model


def dense_of(prepared, plain):
    """The plain model with the numbers that the prepared one's matrices stand for."""
    modules = dict(prepared.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            matrix = getattr(modules[name], "matrix", None)
            if matrix is not None:
                module.weight.copy_(matrix.dense(torch.float32))
    return plain


@over(KNOWN + [row for row in ROWS if row not in KNOWN][::4])  # the others run matrix by matrix
@torch.no_grad()
def test_a_prepared_model_gives_the_logits_of_its_dense_weights(config):
    tokens = some_tokens(2, CONTEXT)
    model = small(config)
    for weights, within in FORMATS.items():
        if weights != "float32" and is_discrete(config):
            continue
        prepared = prepare_for_inference(model, weights)
        expected = dense_of(prepared, small(config))(tokens)
        for sizes in ([1] * CONTEXT, [16, 4, 3, 1], [CONTEXT]):
            cache = prepared.new_cache(2)
            got = [prepared(chunk, cache=cache) for chunk in tokens.split(sizes, dim=1)]
            error = (torch.cat(got, dim=1).float() - expected).square().mean().sqrt()
            assert error < within * expected.std(), (weights, sizes[0])


@NEEDS_A_COMPILER
def test_the_kernels_take_the_blocks_exactly_where_they_know_the_configuration(config):
    model = make_model(config)
    prepared = prepare_for_inference(model, "int8")
    assert Fused(prepared, prepared.new_cache(2)).is_known == kernels.knows(config)


def test_every_variant_that_the_kernels_know_is_tested_in_them():
    names = {(part, name) for row in KNOWN for part, name in row.items()}
    others = {(part, name) for part, values in PARTS.items() for name in values} - names
    assert others == {
        ("position", "dynamic ntk"), ("placement", "post"), ("placement", "deepnorm"),
        ("ends", "skips"), ("ends", "value embeddings"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_a_prepared_router_is_exact_in_every_format(kind):
    model = make_model(config_of({"mlp": "mixtral"}), seed=1)
    prepared = prepare_for_inference(model, kind)
    x = torch.randn(5, 64)
    ours, theirs = (m.blocks[0].mlp.router(x) for m in (prepared, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def learns(model):
    """Every parameter has a gradient, but those that are not learned."""
    model.train()
    model.zero_grad()
    loss_of(model, some_tokens(2, CONTEXT)).backward()
    unused = {
        id(parameter)
        for moe in model.modules()
        if isinstance(moe, MoE)
        for expert, load in zip(moe.experts, moe.load, strict=True)
        for parameter in expert.parameters()
        if load == 0
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name.endswith("mlp.preference")
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or id(parameter) in unused, name
    model.eval()


def test_every_parameter_learns(model):
    learns(model)


@over(ROWS[::6])  # attention is the same whatever the other parts are
def test_every_parameter_learns_through_hard_attention(row):
    config = config_of(row, attention_top_k=1)
    learns(make_model(config, seed=1, dtype=torch.float64))


@over(ROWS[::3])  # files are flushed to the disk
def test_a_checkpoint_has_the_same_logits(row, tmp_path):
    config = config_of(row)
    model = make_model(config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    path = checkpoints.save(
        tmp_path,
        checkpoints.State(
            step=1, model=config, weights=weights, training={}, progress={}, metrics={}
        ),
    )
    loaded = checkpoints.load_model(checkpoints.verify(path))
    tokens = some_tokens(2, CONTEXT)
    assert torch.equal(loaded(tokens), model(tokens))
    for (name, one), two in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert one.requires_grad == two.requires_grad, name


def test_a_small_step_lowers_the_loss_of_its_batch(config):
    torch.manual_seed(2)
    model = GPT(config).train().double()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4
    )
    tokens = some_tokens(2, CONTEXT)
    before = loss_of(model, tokens)
    before.backward()
    optimizer.step()
    assert loss_of(model, tokens) < before


def parts_of(model):
    """The model's children in their order, and the blocks one by one."""
    for child in model.children():
        yield from child if child is model.blocks else [child]


def test_new_weights_reach_every_parameter_and_are_the_same_part_by_part(config):
    with torch.device("meta"):
        models = [GPT(config) for _ in range(2)]
    for model, parts in zip(models, (lambda whole: [whole], parts_of), strict=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(4)
        for part in parts(model):
            model.initialise(part)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, two), name


def test_parameters_are_counted_without_building_the_model(config, model):
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_a_shorter_context_changes_no_logits(config):
    model = make_model(config, seed=1, dtype=torch.float64)
    tokens = some_tokens(2, 9)
    expected = model(tokens)
    crop_context(model, 9)
    rebuilt = GPT(model.config).double().eval()
    rebuilt.load_state_dict(model.state_dict())
    for cropped in (model, rebuilt):
        assert_close(cropped(tokens), expected)


@torch.no_grad()
def test_a_larger_vocabulary_keeps_the_old_tokens_logits(config):
    model = make_model(config, seed=1, dtype=torch.float64)
    tokens = some_tokens(2, CONTEXT)
    expected = model(tokens)
    resize_vocabulary(model, V + 3)
    got = model(tokens)
    assert got.shape[-1] == V + 3
    if config.copy == "none":  # else they are log-probabilities
        assert_close(got[..., :V], expected)
    resize_vocabulary(model, V)
    assert_close(model(tokens), expected)
