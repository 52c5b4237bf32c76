"""The kernels for training give the numbers and gradients of the formulas that they replace."""

import functools
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from gpt import cpp_library, kernels, training_kernels
from gpt.config import ModelConfig, NormPlacement
from gpt.device import cpu_features
from gpt.model.gpt import GPT
from gpt.model.shared import Rotation
from tests.model.family import CONTEXT, ROWS, config_of, id_of

pytestmark = pytest.mark.skipif(
    kernels.library() is None, reason=f"no kernels: {kernels.problem()}"
)
USUAL = 40
"""The combinations of techniques in the usual run; the rest are slow tests."""
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of results and gradients, in parts of their root mean square."""
PATHS = {
    "portable": ("x86-64", {"sse2"}),
    "AVX2": ("x86-64-v3", {"avx2"}),
    "native": ("native", set()),
}
"""The compiler's -march for each path of vectors.h, and the features that it needs."""


def split_heads(qkv, cos, sin, *, eps):
    return torch.cat(training_kernels.split_heads(qkv, 3, 2, eps=eps, turns=(cos, sin)), dim=1)


def split_heads_by_operators(qkv, cos, sin, *, eps):
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 7, -1).transpose(1, 2).split((3, 2, 2), dim=1)
    if eps is not None:
        q, k = (F.rms_norm(x, x.shape[-1:], eps=eps) for x in (q, k))
    turn = Rotation(cos.to(qkv.dtype), sin.to(qkv.dtype))
    return torch.cat([turn.query(q), turn.key(k), v], dim=1)


def attention_by_operators(q, k, v, *, scale):
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def angles(*shape):
    turned = torch.randn(shape)
    return turned.cos(), turned.sin()


CASES = {
    "norm": (
        lambda x: training_kernels.rms_norm(x, None, 1e-5, x.dtype),
        lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5),
        lambda: [torch.randn(5, 7, 37) * 3],
    ),
    "norm with a weight": (
        lambda x, w: training_kernels.rms_norm(x, w.float(), 1e-5, x.dtype),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, eps=1e-5),
        lambda: [torch.randn(40, 64), torch.randn(64)],
    ),
    "squared ReLU": (
        training_kernels.relu_squared,
        lambda x: F.relu(x).square(),
        lambda: [torch.randn(3, 41)],
    ),
    "heads": (
        functools.partial(split_heads, eps=None),
        functools.partial(split_heads_by_operators, eps=None),
        lambda: [torch.randn(2, 5, 7 * 16), *angles(5, 8)],
    ),
    "heads with norms": (
        functools.partial(split_heads, eps=1e-6),
        functools.partial(split_heads_by_operators, eps=1e-6),
        lambda: [torch.randn(2, 5, 7 * 22), *angles(5, 9)],
    ),
    "heads of documents": (
        functools.partial(split_heads, eps=1e-6),
        functools.partial(split_heads_by_operators, eps=1e-6),
        lambda: [torch.randn(3, 5, 7 * 20), *angles(3, 1, 5, 10)],
    ),
    "attention": (
        functools.partial(training_kernels.causal_attention, p=0.0, scale=0.3),
        functools.partial(attention_by_operators, scale=0.3),
        lambda: [torch.randn(2, 3, 37, 10) * 2 for _ in range(3)],
    ),
    "attention of grouped queries": (
        functools.partial(training_kernels.causal_attention, p=0.0, scale=0.3),
        functools.partial(attention_by_operators, scale=0.3),
        lambda: [torch.randn(2, n, training_kernels.QUERIES + 7, 10) for n in (6, 2, 2)],
    ),
    "attention in three blocks": (
        functools.partial(training_kernels.causal_attention, p=0.0, scale=0.3),
        functools.partial(attention_by_operators, scale=0.3),
        lambda: [torch.randn(1, 2, 2 * training_kernels.QUERIES + 7, 10) for _ in range(3)],
    ),
}
"""A function of the module, its formula, and what both are computed of."""


def learned(function, tensors, slope=None):
    """The result, and its gradients by the first tensor, a weight, keys and values."""
    leaves = [
        t.detach()
        .clone()
        .requires_grad_(
            t is tensors[0] or t.ndim == 1 or (len(tensors) == 3 and t.ndim == tensors[0].ndim)
        )
        for t in tensors
    ]
    out = function(*leaves)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    out.backward(slope)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def apart(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def computed_by(name, dtype):
    """The kernels' results in ``dtype``, and the formulas' of the same numbers in float64."""
    torch.manual_seed(1)
    function, formula, make = CASES[name]
    tensors = [t.to(dtype) if i == 0 or "attention" in name else t for i, t in enumerate(make())]
    assert training_kernels.takes(tensors[0].requires_grad_())
    return learned(function, tensors), learned(formula, [t.double() for t in tensors])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_the_numbers_and_gradients_of_its_formula(name, dtype):
    got, expected = computed_by(name, dtype)
    assert len(got) == len(expected) > 1
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert apart(one, other) < TOLERANCES[dtype]


@pytest.fixture(scope="module", params=PATHS)
def compiled(request, tmp_path_factory):
    march, needed = PATHS[request.param]
    if missing := needed - cpu_features():
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(cpp_library, "TARGETS", dict.fromkeys(cpp_library.TARGETS, march))
        return training_kernels.load()


@pytest.mark.parametrize("name", CASES)
def test_each_path_gives_them(name, compiled, monkeypatch):
    monkeypatch.setattr(training_kernels, "library", lambda: compiled)
    for got, expected in zip(*computed_by(name, torch.float32), strict=True):
        assert apart(got, expected) < 2e-6


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=id_of(row), marks=[] if i < USUAL else pytest.mark.slow)
        for i, row in enumerate(ROWS)
    ],
)
def test_a_model_of_any_techniques_learns_the_same_with_and_without_them(row, monkeypatch):
    config = config_of(row)
    tokens = torch.randint(config.vocab_size, (2, CONTEXT))
    gradients = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(training_kernels, "library", lambda: None)
        torch.manual_seed(2)
        model = GPT(config).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        learned = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(learned))
    assert apart(gradients[0], gradients[1].double()) < 2e-5


@pytest.mark.parametrize("placement", get_args(NormPlacement))
def test_only_what_products_read_is_rounded_to_autocasts_dtype(placement):
    """Neither the residual stream, nor what a router chooses experts by."""
    config = ModelConfig(
        vocab_size=50, context_length=8, n_layer=2, n_head=2, n_embd=32, norm="rmsnorm",
        norm_placement=placement, n_expert=4, n_expert_active=2,
    )  # fmt: skip
    model, seen = GPT(config).train(), {}

    def watch(name, module, args):
        seen[name] = args[0].dtype

    for name in ("blocks.1", "blocks.1.mlp", "blocks.1.attn.qkv"):
        model.get_submodule(name).register_forward_pre_hook(functools.partial(watch, name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.arange(8)[None])
    assert seen["blocks.1"] == torch.float32
    assert seen["blocks.1.mlp"] == torch.float32
    has_own_norm = placement in ("pre", "sandwich", "parallel")
    assert seen["blocks.1.attn.qkv"] == (torch.bfloat16 if has_own_norm else torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_leaves_its_share_and_the_backward_pass_knows_which(p, dtype):
    torch.manual_seed(3)
    x, y = torch.zeros(100_003), torch.ones(100_003, dtype=dtype, requires_grad=True)
    out = training_kernels.add_dropped(x, y, p)
    kept = out.detach() != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.006)  # 3 standard deviations
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    out.sum().backward()
    torch.testing.assert_close(y.grad.float(), out.detach(), rtol=4e-3, atol=0)
    again = training_kernels.add_dropped(x, y, p) != 0
    assert (again & kept).float().mean().item() == pytest.approx((1 - p) ** 2, abs=0.006)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(4)
    y = torch.ones(1 << 16, requires_grad=True)
    kept = (training_kernels.add_dropped(torch.zeros(1 << 16), y, 0.5) != 0).float()
    for lag in (1, 2, 8, 16, 64, 256, 4096):
        both = (kept[:-lag] * kept[lag:]).mean().item()
        assert both == pytest.approx(0.25, abs=0.007)  # 4 standard deviations


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("length", [33, 300])
def test_attention_with_dropout_has_the_gradients_of_the_weights_that_are_left(length, dtype):
    torch.manual_seed(5)
    T = length
    assert len(training_kernels._blocks(T)) == 1 + T // training_kernels.QUERIES
    q, k = (torch.randn(2, 2, T, T, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.eye(T, dtype=dtype).repeat(2, 2, 1, 1).requires_grad_()
    left = training_kernels.causal_attention(q, k, v, p=0.25, scale=0.2)  # of the identity
    slope = torch.randn_like(left)
    left.backward(slope)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = (exact[0] @ exact[1].mT * 0.2).masked_fill(hidden, -torch.inf).softmax(-1)
    dropped = weights * (left.detach() != 0) / 0.75
    assert apart(left.detach(), dropped.detach()) < TOLERANCES[dtype]
    assert (left != 0).float().sum() / (2 * 2 * T * (T + 1) / 2) == pytest.approx(0.75, abs=0.04)
    (dropped @ exact[2]).backward(slope.double())
    for got, expected in zip((q, k, v), exact, strict=True):
        assert apart(got.grad, expected.grad) < 2 * TOLERANCES[dtype]


def test_autocast_does_not_change_the_dtype_of_attention():
    torch.manual_seed(7)
    q, k, v = (torch.randn(1, n, 300, 8, requires_grad=True) for n in (4, 2, 2))
    slope, found = torch.randn_like(q), []
    for enabled in (False, True):
        torch.manual_seed(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = training_kernels.causal_attention(q, k, v, p=0.1, scale=0.3)
        found.append([y, *torch.autograd.grad(y, (q, k, v), slope)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_computes_few_hidden_pairs_and_keeps_the_weights_of_one_block(monkeypatch):
    T, kept = 2048, []
    q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
    products = []
    run = training_kernels._run
    monkeypatch.setattr(
        training_kernels,
        "_run",
        lambda name, dtype, weights, *rest: (
            products.append(weights.numel()),
            run(name, dtype, weights, *rest),
        ),
    )
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        out = training_kernels.causal_attention(q, k, v, p=0.0, scale=1.0)
    assert sum(products) < 0.6 * 2 * T * T
    assert sum(kept) == 3 * q.numel() + 2 * training_kernels.QUERIES * T
    products.clear()
    out.sum().backward()
    assert sum(products) < 1.2 * 2 * T * T  # once more, and their slopes


def test_neither_the_number_of_threads_nor_the_run_changes_a_bit():
    def results():
        torch.manual_seed(6)
        x, y = torch.randn(65, 130), torch.randn(65, 130, requires_grad=True)
        out = training_kernels.rms_norm(
            training_kernels.add_dropped(x, y, 0.3), None, 1e-5, x.dtype
        )
        q = out.view(1, 1, 65, 130)
        attended = training_kernels.causal_attention(q, q, q, p=0.2, scale=0.1)
        attended.square().sum().backward()
        return attended.detach(), y.grad

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        assert training_kernels._threads() >= 3
        together = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_scores_that_are_all_low_are_compared_with_each_other():
    q, k = torch.full((1, 1, 3, 4), -20.0), torch.full((1, 1, 3, 4), 20.0)
    k[0, 0, 1] = 19.9
    v = torch.eye(3)[None, None]
    got = training_kernels.causal_attention(q.requires_grad_(), k, v, p=0.0, scale=1.0)
    expected = attention_by_operators(q.double(), k.double(), v.double(), scale=1.0)
    assert apart(got.detach(), expected.detach()) < 1e-4


def test_both_numbers_of_a_seed_count(monkeypatch):
    y = torch.ones(1000, requires_grad=True)

    def kept(seed, key):
        drawn = training_kernels._Dropout(seed, key, 2**31, 2.0)
        monkeypatch.setattr(training_kernels, "_drawn", lambda p, like: drawn)
        return training_kernels.add_dropped(torch.zeros(1000), y, 0.5) != 0

    assert torch.equal(kept(1, 1), kept(1, 1))
    for other in (kept(2, 1), kept(1, 2)):
        assert 0.4 < (other == kept(1, 1)).float().mean() < 0.6


def test_threads_add_up_the_gradient_of_a_norms_weight():
    before, got = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            torch.manual_seed(7)
            x, weight = torch.randn(100, 40), torch.randn(40, requires_grad=True)
            out = training_kernels.rms_norm(x, weight, 1e-5, x.dtype)
            out.backward(torch.randn(100, 40))
            got.append(weight.grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*got)


@pytest.mark.parametrize("name", CASES)
def test_nan_stays_nan(name):
    torch.manual_seed(1)
    function, _, make = CASES[name]
    tensors = make()
    tensors[0].flatten()[3] = torch.nan
    tensors[0].requires_grad_()
    assert function(*tensors).isnan().any()


def test_what_they_do_not_take_is_told_before_they_run(monkeypatch):
    x = torch.randn(3, 16, requires_grad=True)
    assert training_kernels.takes(x, None)
    assert not training_kernels.takes(x.detach())
    assert not training_kernels.takes(x.double())
    assert not training_kernels.takes(x.to("meta"))
    with torch.no_grad():
        assert not training_kernels.takes(x)
    with pytest.raises(ValueError, match="are not for 2 x 5 tokens of heads of 16"):
        training_kernels.split_heads(torch.randn(2, 5, 7 * 16), 3, 2, turns=angles(4, 8))
    monkeypatch.setattr(training_kernels, "library", lambda: None)
    assert not training_kernels.takes(x)
