"""Models converted for inference: every format's arithmetic is that of its dense weights, and its
rounding is bounded.
"""

import copy
import dataclasses
import functools
import json
import os
import pickle
import platform
import re
import resource
import subprocess
import sys
import types

import pytest
import torch

import gpt
from gpt import cpp_library, kernels
from gpt.config import ExportConfig, GenerationConfig, ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer
from gpt.device import cpu_features
from gpt.generation import inference
from gpt.generation.decode import decode
from gpt.generation.inference import FEW, InferenceGPT, PackedLinear, prepare_for_inference
from gpt.generation.quantisation import Matrix
from gpt.interop.packed import DESCRIBED, load_packed, save_packed
from gpt.model.attention import CausalSelfAttention
from tests.conftest import make_model

KINDS = ["float32", "bfloat16", "int8", "int4"]
NEEDS_A_COMPILER = pytest.mark.skipif(
    kernels.library() is None, reason=f"no kernels: {kernels.problem()}"
)
CONFIG = ModelConfig(vocab_size=257, context_length=48, n_layer=2, n_head=2, n_embd=64)
VARIANTS = {
    "gpt2": {},
    "grouped-query": {"n_head": 4, "n_kv_head": 2},
    "one key head": {"n_head": 4, "n_kv_head": 1},
    "no biases": {"bias": False},
    "separate head": {"tie_embeddings": False},
    "odd widths": {"n_embd": 96, "n_head": 3, "n_inner": 200},
    "narrow heads": {"n_head": 8},  # which the kernels of whole blocks do not take
    "scaled by layer": {"scale_attention_by_layer": True},
    "unscaled": {"scale_attention": False},
    **{name: {"activation": name} for name in ("gelu", "relu", "silu", "tanh")},
}


def model_of(**changes):
    model = make_model(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        model.position.weight.mul_(3)
    return model


def dense_of(prepared, plain):
    """The plain model with the numbers that the prepared one's matrices stand for."""
    dense = copy.deepcopy(plain)
    modules = dict(prepared.named_modules())
    with torch.no_grad():
        for name, module in dense.named_modules():
            matrix = getattr(modules[name], "matrix", None)
            if matrix is not None:
                module.weight.copy_(matrix.dense(torch.float32))
    return dense


def some_tokens(rows, n, seed=0):
    return torch.randint(257, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape", [(5, 128), (7, 96), (3, 200), (40, 32), (70, 96), (2, 1), (1, 513)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@NEEDS_A_COMPILER
def test_a_product_with_few_rows_is_that_of_the_dense_matrix(kind, shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0])
    packed = PackedLinear(Matrix(kind, linear.weight), linear.bias, torch.float32, few=40)
    for rows in (1, 2, 3, 5, 8, 9, 20, 40):
        x = torch.randn(rows, shape[1])
        exact = x @ packed.weight.T + linear.bias
        # activations are rounded: to bfloat16, or to 127ths of their group's largest
        within = {"float32": 1e-6, "bfloat16": 0.004}.get(kind, 0.02)
        scale = x.norm(dim=1, keepdim=True) * packed.weight.norm(dim=1) + 1
        assert ((packed(x) - exact).abs() / scale).max() < within
        alone = torch.cat([packed(row[None]) for row in x])
        assert torch.equal(packed(x), alone)  # a row's product does not depend on the others


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_and_torch_read_a_matrix_alike(kind, monkeypatch):
    matrix = Matrix(kind, torch.randn(9, 200))
    ids = torch.tensor([[3, 8], [0, 3]])
    for dtype in (torch.float32, torch.bfloat16):
        with_kernels = matrix.dense(dtype), matrix.rows(ids, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "library", lambda: None)
            dense, rows = matrix.dense(dtype), matrix.rows(ids, dtype)
        assert torch.allclose(with_kernels[0].float(), dense.float(), rtol=1e-2, atol=1e-6)
        assert torch.equal(rows, dense[ids])
        assert torch.equal(with_kernels[1], with_kernels[0][ids])


@pytest.mark.parametrize(("kind", "error"), [("bfloat16", 0.002), ("int8", 0.01), ("int4", 0.08)])
def test_rounding_is_no_worse_than_its_bits(kind, error):
    weight = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    weight[5] *= 100  # a channel's scale is its own
    dense = Matrix(kind, weight).dense(torch.float32)
    for row in (0, 5):
        assert (dense[row] - weight[row]).norm() < error * weight[row].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_few_values_is_kept(kind):
    for row in ([0.0] * 64, [1.5] * 64, [0.0, 1.0] * 32, [-2.0] * 32 + [0.0] * 32):
        weight = torch.tensor([row])
        assert torch.allclose(Matrix(kind, weight).dense(torch.float32), weight, atol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_decoding_gives_the_dense_models_logits(kind, variant):
    plain = model_of(**VARIANTS[variant])
    prepared = prepare_for_inference(plain, kind)
    dense = dense_of(prepared, plain)
    tokens = some_tokens(3, 40)
    expected = dense(tokens)
    within = {"float32": 1e-5, "bfloat16": 0.02}.get(kind, 0.05) * expected.norm()
    assert (prepared(tokens).float() - expected).norm() < within
    cache = prepared.new_cache(3)
    chunks = [prepared(tokens[:, :17], cache=cache)]
    chunks += [prepared(tokens[:, i : i + 1], cache=cache) for i in range(17, 40)]
    cached = torch.cat([chunk.float() for chunk in chunks], dim=1)
    assert (cached - expected).norm() < within
    if kind == "float32":
        assert (cached - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "chunks", [[1] * 40, [3] * 13 + [1], [20, 1, 7, 12], [40], [33, 7]], ids=str
)
@torch.inference_mode()
def test_any_chunking_gives_the_same_logits(kind, chunks):
    prepared = prepare_for_inference(model_of(), kind)
    tokens = some_tokens(2, 40)
    cache = prepared.new_cache(2)
    whole = prepared(tokens).float()
    got = [prepared(chunk, cache=cache).float() for chunk in tokens.split(chunks, dim=1)]
    within = {"float32": 1e-5, "bfloat16": 0.02}.get(kind, 0.05)
    assert (torch.cat(got, dim=1) - whole).norm() < within * whole.norm()


@NEEDS_A_COMPILER
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_tokens_that_are_read_together_are_each_read_alone_to_the_bit(kind):
    prepared = prepare_for_inference(model_of(**VARIANTS["grouped-query"]), kind)
    tokens = some_tokens(5, 4)
    together, chunked = prepared.new_cache(5), prepared.new_cache(5)
    rows = torch.cat([prepared(t, cache=together) for t in tokens.split(1, dim=1)], dim=1)
    assert torch.equal(prepared(tokens, cache=chunked), rows)
    for i in range(5):
        alone = prepared.new_cache()
        singles = tokens[i : i + 1].split(1, dim=1)
        assert torch.equal(
            torch.cat([prepared(t, cache=alone) for t in singles], dim=1)[0], rows[i]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["gpt2", "grouped-query", "narrow heads"])
@torch.inference_mode()
def test_rows_of_unequal_lengths_are_each_row_alone(kind, variant):
    prepared = prepare_for_inference(model_of(**VARIANTS[variant]), kind)
    lengths = [3, 30, 1, 12]
    tokens = some_tokens(4, 31)
    together = prepared.new_cache(4)
    prepared(tokens[:, :30], cache=together)
    together.truncate(lengths)
    last = prepared(torch.stack([row[n : n + 1] for row, n in zip(tokens, lengths, strict=True)]),
                    cache=together)  # fmt: skip
    for i, n in enumerate(lengths):
        alone = prepared.new_cache()
        prepared(tokens[i : i + 1, :n], cache=alone)
        expected = prepared(tokens[i : i + 1, n : n + 1], cache=alone)
        scale = expected.abs().max()
        assert (last[i] - expected[0]).abs().max() < (2e-5 if kind == "float32" else 0.1) * scale
    assert together.lengths == [n + 1 for n in lengths]


@NEEDS_A_COMPILER
def test_few_and_many_rows_give_the_same_tokens():
    prepared = prepare_for_inference(model_of(), "float32")
    config = GenerationConfig(temperature=0, max_new_tokens=12)
    prompts = some_tokens(2 * FEW + 3, 9).tolist()
    together = {}
    for token in decode(prepared, prompts, config, batch_size=len(prompts)):
        together.setdefault(token.sequence, []).append(token.id)
    for i, prompt in enumerate(prompts):
        assert together[i] == [t.id for t in decode(prepared, [prompt], config)]


@NEEDS_A_COMPILER
def test_a_number_that_is_none_is_passed_on():
    for kind in KINDS:
        for bad in (torch.nan, torch.inf):
            linear = PackedLinear(Matrix(kind, torch.randn(3, 64)), None, torch.float32, few=8)
            x = torch.zeros(1, 64)
            x[0, 40] = bad
            assert not linear(x).isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_does_not_fit_is_refused_and_not_written_past(kind):
    prepared = prepare_for_inference(model_of(), kind)
    token = torch.tensor([[3]])
    other = model_of(n_layer=1, n_embd=32)
    for cache in (prepared.new_cache(2), other.new_cache()):
        cache.lengths = [4] * cache.batch_size
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            prepared(torch.cat([token] * 3), cache=cache)
    full = prepared.new_cache(capacity=4)
    prepared(token.expand(1, 4), cache=full)
    with pytest.raises(ValueError, match="4 of 4 tokens, and 1 more do not fit"):
        prepared(token, cache=full)
    for wrong in (-1, 257):
        with pytest.raises((IndexError, RuntimeError)):
            prepared(torch.tensor([[wrong]]), cache=prepared.new_cache())


def test_without_a_compiler_the_texts_are_nearly_the_same(monkeypatch):
    plain = model_of()
    tokens = some_tokens(2, 20)
    for kind in KINDS:
        with_kernels = prepare_for_inference(plain, kind)
        with monkeypatch.context() as patch, torch.inference_mode():
            expected = with_kernels(tokens).float()
            patch.setattr(kernels, "library", lambda: None)
            without = prepare_for_inference(plain, kind)
            assert without.few == 0
            cache = without.new_cache(2)
            without(tokens[:, :-1], cache=cache)
            last = without(tokens[:, -1:], cache=cache).float()
        difference = (last[:, 0] - expected[:, -1]).norm() / expected[:, -1].norm()
        assert difference < (1e-5 if kind == "float32" else 0.05)


@pytest.mark.parametrize("shape", [(5, 128), (7, 96), (70, 200), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchs_products_are_those_of_the_dense_matrix(kind, shape, monkeypatch):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0])
    packed = PackedLinear(Matrix(kind, linear.weight), linear.bias, torch.float32, few=0)
    for rows in (1, 3, FEW):
        x = torch.randn(rows, shape[1])
        exact = x @ packed.weight.T + linear.bias
        scale = x.norm(dim=1, keepdim=True) * packed.weight.norm(dim=1) + 1
        assert ((packed(x) - exact).abs() / scale).max() < 0.02
    assert packed._product is not None  # no dense matrix was made


KERNEL_PATHS = {
    "native": ("native", set()),
    "AVX-512": ("cascadelake", {"avx512_vnni", "avx512_bw"}),
    "AVX-512 with bfloat16": ("cooperlake", {"avx512_vnni", "avx512_bw", "avx512_bf16"}),
    "AVX2": ("x86-64-v3", {"avx2"}),
    "AVX2 with VNNI": ("alderlake", {"avx2", "avx_vnni"}),
    "portable": ("x86-64", set()),
}
"""For each path of kernels.cpp: the compiler's -march, and the features that it needs."""


@pytest.fixture(scope="module")
def compiled_for(tmp_path_factory):
    """Compiles the kernels for a value of -march, in a cache of its own, once. With less
    optimisation than the program's it takes half the time.
    """
    cache = str(tmp_path_factory.mktemp("kernels"))

    @functools.cache
    def compiled(march, level="-O1"):
        if (march, level) == ("native", "-O3"):
            return kernels.library()  # which other tests need too
        flags = [level if flag == "-O3" else flag for flag in cpp_library.FLAGS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", cache)
            patch.setattr(cpp_library, "TARGETS", dict.fromkeys(cpp_library.TARGETS, march))
            patch.setattr(cpp_library, "FLAGS", flags)
            return kernels.load()

    return compiled


@NEEDS_A_COMPILER
@pytest.mark.parametrize("level", ["-O1", pytest.param("-O3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", KERNEL_PATHS)
def test_each_path_of_the_kernels_gives_the_numbers_of_the_portable_one(
    path, level, monkeypatch, compiled_for
):
    """In the usual run only this processor's path is compiled as the program does it."""
    march, needs = KERNEL_PATHS[path]
    if platform.machine() != "x86_64":
        pytest.skip("the paths are those of x86-64, and this machine is another one")
    if missing := needs - cpu_features():
        pytest.skip(f"the processor lacks {', '.join(sorted(missing))}")
    portable = compiled_for("x86-64")
    tested = compiled_for(march, "-O3" if march == "native" else level)
    prepared = {kind: prepare_for_inference(model_of(n_embd=160), kind) for kind in KINDS}
    tokens, x = some_tokens(2, 7), torch.randn(7, 160)

    def decoded(library):
        monkeypatch.setattr(kernels, "library", lambda: library)
        with torch.inference_mode():
            return {
                kind: (
                    model(tokens, cache=model.new_cache(2)),
                    model.head(x),
                    model.head.matrix.dense(torch.float32),
                    model.head.matrix.dense(torch.bfloat16),
                )
                for kind, model in prepared.items()
            }

    expected = decoded(portable)
    for kind, got in decoded(tested).items():
        # one path rounds the activations of a bfloat16 product, and another does not; a product's
        # last bits may move an activation of the next layer to another of its 8-bit values
        bounds = {"float32": (1e-5, 1e-6), "bfloat16": (1e-2, 4e-3)}.get(kind, (1e-2, 1e-6))
        for bound, mine, portables in zip((*bounds, 1e-6, 4e-3), got, expected[kind], strict=True):
            assert (mine - portables).norm() < bound * portables.norm()


def test_the_model_that_was_given_stays_as_it_is():
    plain = model_of()
    before = copy.deepcopy(plain.state_dict())
    prepared = prepare_for_inference(plain, "int4")
    assert isinstance(prepared, InferenceGPT)
    assert type(plain) is gpt.GPT
    assert all(torch.equal(before[name], p) for name, p in plain.state_dict().items())
    assert all(p.requires_grad for p in plain.parameters())
    assert prepared.parameter_count() == plain.parameter_count()
    assert prepared.embed.matrix is prepared.head.matrix


def test_the_bytes_are_those_of_the_format():
    plain = model_of(vocab_size=1000, n_embd=256, n_head=4)
    matrices = plain.parameter_count() - plain.position.weight.numel()
    size = {}
    for kind in KINDS:
        prepared = prepare_for_inference(plain, kind)
        matrix = [m for m in prepared.modules() if isinstance(m, Matrix)]
        size[kind] = sum(b.nbytes for m in set(matrix) for b in m.buffers()) / matrices
    assert size["float32"] == pytest.approx(4, rel=0.02)
    assert size["bfloat16"] == pytest.approx(2, rel=0.02)
    assert size["int8"] == pytest.approx(1, rel=0.03)
    assert size["int4"] == pytest.approx(0.625, rel=0.02)


@NEEDS_A_COMPILER
def test_a_model_that_was_moved_is_read_at_its_new_place():
    prepared = prepare_for_inference(model_of(), "int8")
    tokens = some_tokens(1, 5)

    def decoded():
        cache = prepared.new_cache()
        with torch.inference_mode():
            prepared(tokens[:, :4], cache=cache)
            return prepared(tokens[:, 4:], cache=cache)

    before = decoded()
    old = prepared.blocks[0].mlp.up.matrix.data
    prepared._apply(lambda tensor: tensor.clone())
    old.zero_()
    assert torch.equal(decoded(), before)


@NEEDS_A_COMPILER
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64, torch.bfloat16], ids=str)
def test_texts_do_not_depend_on_torchs_defaults(default, kind):
    prepared = prepare_for_inference(model_of(), kind)
    config = GenerationConfig(seed=1, max_new_tokens=12, top_k=20, repetition_penalty=1.1)
    prompts = some_tokens(2, 40).tolist() + some_tokens(1, 3).tolist()

    def texts():
        return [(t.sequence, t.id) for t in decode(prepared, prompts, config)]

    expected, before = texts(), torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        assert texts() == expected
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def forward_of_its_own(self, x, shared):
    return CausalSelfAttention.forward(self, x, shared) * 3


def a_forward_of_its_own(model):
    attn = model.blocks[1].attn
    attn.forward = types.MethodType(forward_of_its_own, attn)


def a_class_of_its_own(model):
    class Shifted(CausalSelfAttention):
        forward = forward_of_its_own

    model.blocks[1].attn.__class__ = Shifted


def a_hook(model):
    model.blocks[1].attn.register_forward_hook(lambda module, x, out: out * 3)


def a_hook_before(model):
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, x: (x[0] * 3,))


def another_activation(model):
    model.blocks[1].mlp.activation = torch.tanh


def a_block_less(model):
    del model.blocks[1:]


def the_first_block_less(model):
    del model.blocks[0]


def no_blocks(model):
    del model.blocks[:]


def another_order(model):
    model.blocks = torch.nn.ModuleList(reversed(model.blocks))
    for layer, block in enumerate(model.blocks):
        block.attn.layer = layer


def another_width_inside(model):
    other = prepare_for_inference(model_of(n_inner=40), model.weights)
    model.blocks[1].mlp = other.blocks[1].mlp


def other_weights(model):
    other = prepare_for_inference(make_model(CONFIG, seed=3), model.weights)
    model.blocks[1] = other.blocks[1]


CHANGES = [
    a_forward_of_its_own, a_class_of_its_own, a_hook, a_hook_before, another_activation,
    a_block_less, the_first_block_less, no_blocks, another_order, another_width_inside,
    other_weights,
]  # fmt: skip


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_changed_blocks_of_a_packed_model_do_when_cached_what_they_do_uncached(change, kind, used):
    prepared = prepare_for_inference(model_of(), kind)
    tokens = some_tokens(2, 24)
    if used:
        prepared(tokens[:, :1], cache=prepared.new_cache(2))
    unchanged = prepared(tokens)
    change(prepared)
    whole, cache = prepared(tokens), prepared.new_cache(2)
    chunks = tokens.split([17] + [1] * 7, dim=1)  # matrix by matrix, and then all blocks
    cached = torch.cat([prepared(chunk, cache=cache) for chunk in chunks], dim=1)
    within = (1e-5 if kind == "float32" else 0.05) * whole.norm()
    assert (cached - whole).norm() < within
    assert (cached - unchanged).norm() > 2 * within


@NEEDS_A_COMPILER
@torch.inference_mode()
def test_a_patched_class_runs_as_it_was_patched(monkeypatch):
    prepared = prepare_for_inference(model_of(), "float32")
    tokens, forward = some_tokens(1, 6), CausalSelfAttention.forward
    monkeypatch.setattr(
        CausalSelfAttention, "forward", lambda self, x, shared: 2 * forward(self, x, shared)
    )
    whole, cache = prepared(tokens), prepared.new_cache()
    cached = torch.cat([prepared(t, cache=cache) for t in tokens.split(1, dim=1)], dim=1)
    assert (cached - whole).norm() < 1e-5 * whole.norm()


@NEEDS_A_COMPILER
@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_run_whole_blocks_wherever_they_know_them(variant, monkeypatch):
    prepared = prepare_for_inference(model_of(**VARIANTS[variant]), "int8")
    calls, run = [], kernels.Blocks.run
    monkeypatch.setattr(
        kernels.Blocks, "run", lambda self, *given: calls.append(given) or run(self, *given)
    )
    for model in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        calls.clear()
        model(some_tokens(1, 1), cache=model.new_cache())
        assert len(calls) == (0 if variant == "narrow heads" else 1)


@torch.inference_mode()
def test_what_is_set_by_hand_in_a_cache_is_not_written_past():
    prepared = prepare_for_inference(model_of(), "int8")
    cache = prepared.new_cache(2)
    cache.lengths = [0, 0, 0]
    with pytest.raises(RuntimeError):
        prepared(some_tokens(3, 1), cache=cache)


class Lora(torch.nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.down = torch.nn.Parameter(torch.ones(2, linear.in_features))


def a_subclass(model):
    model.blocks[0].mlp.up = Lora(model.blocks[0].mlp.up)


def one_more_weight(model):
    model.blocks[0].mlp.up.lora = torch.nn.Parameter(torch.ones(3))


def one_more_layer(model):
    model.blocks[0].mlp.up.lora = torch.nn.Linear(2, 2)


def another_forward(model):
    up = model.blocks[0].mlp.up
    up.forward = lambda x: torch.nn.functional.linear(x, up.weight, up.bias) + 1


@pytest.mark.parametrize("change", [a_subclass, one_more_weight, one_more_layer, another_forward])
def test_a_linear_layer_that_has_more_in_it_is_not_packed(change):
    model = model_of()
    change(model)
    with pytest.raises(UsageError, match="model.blocks.0.mlp.up is a .*torch's own Linear"):
        prepare_for_inference(model, "int8")


def test_an_embedding_or_a_model_of_another_class_is_not_packed():
    class Table(torch.nn.Embedding):
        pass

    class Other(gpt.GPT):
        pass

    model = model_of()
    model.embed.__class__ = Table
    with pytest.raises(UsageError, match="model.embed is a Table; only torch's own Embedding"):
        prepare_for_inference(model, "int8")
    with pytest.raises(UsageError, match="expected a GPT; cannot convert a Other"):
        prepare_for_inference(Other(CONFIG), "int8")


@NEEDS_A_COMPILER
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_meta_is_refused_and_not_read(kind):
    with torch.device("meta"):
        prepared = prepare_for_inference(gpt.GPT(CONFIG), kind, device=torch.device("cpu"))
    prepared.embed = prepare_for_inference(model_of(), kind).embed
    prepared.position = model_of().position
    with pytest.raises((ValueError, RuntimeError), match="meta"), torch.inference_mode():
        prepared(some_tokens(1, 1), cache=prepared.new_cache())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_loaded_as_they_were_saved(kind, tmp_path):
    for tie in (True, False):
        prepared = prepare_for_inference(model_of(tie_embeddings=tie), kind)
        folder = tmp_path / f"packed-{tie}"
        save_packed(prepared, ByteTokenizer(), folder)
        loaded, tokenizer = gpt.load(folder)
        assert (loaded.weights, loaded.few, tokenizer.kind) == (kind, prepared.few, "byte")
        for prompt in ("a", "some text"):
            options = {"max_new_tokens": 12, "temperature": 0}
            [got] = gpt.generate((loaded, tokenizer), prompt, **options)
            assert [got] == gpt.generate((prepared, tokenizer), prompt, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "variant",
    [{"position": "rotary"}, {"mlp": "gated"}, {"n_expert": 3}, {"norm": "rmsnorm"}],
    ids=str,
)
def test_a_packed_model_of_any_variant_is_loaded_as_it_was_saved(variant, kind, tmp_path):
    prepared = prepare_for_inference(make_model(dataclasses.replace(CONFIG, **variant)), kind)
    save_packed(prepared, ByteTokenizer(), tmp_path / "packed")
    loaded, _ = load_packed(tmp_path / "packed")
    with torch.inference_mode():
        assert torch.equal(loaded(some_tokens(2, 9)), prepared(some_tokens(2, 9)))


@NEEDS_A_COMPILER
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_run_where_there_is_no_compiler_and_the_other_way_round(
    kind, tmp_path, monkeypatch
):
    plain = model_of()
    options = {"max_new_tokens": 12, "temperature": 0}
    for has_one in (True, False):
        with monkeypatch.context() as patch:
            if not has_one:
                patch.setattr(kernels, "library", lambda: None)
            prepared = prepare_for_inference(plain, kind)
            save_packed(prepared, ByteTokenizer(), tmp_path / f"{has_one}")
        with monkeypatch.context() as patch:
            if has_one:
                patch.setattr(kernels, "library", lambda: None)
            loaded = gpt.load(tmp_path / f"{has_one}")
            assert (loaded.model.few == 0) == has_one
            [got] = gpt.generate(loaded, "text", **options)
            assert len(got.tokens) == 12


@NEEDS_A_COMPILER
def test_a_model_made_to_run_can_be_copied_refilled_and_not_cast_or_trained():
    prepared = prepare_for_inference(model_of(), "int4")
    tokens = some_tokens(1, 3)
    with torch.inference_mode():
        before = prepared(tokens, cache=prepared.new_cache())
        for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
            assert torch.equal(other(tokens, cache=other.new_cache()), before)
        new = prepare_for_inference(make_model(CONFIG, seed=5), "int4")
        expected = new(tokens, cache=new.new_cache())
        prepared.load_state_dict(new.state_dict(), assign=True)
        assert torch.equal(prepared(tokens, cache=prepared.new_cache()), expected)
        prepared.load_state_dict(
            prepare_for_inference(model_of(), "int4").state_dict(), assign=True
        )
        assert torch.equal(prepared(tokens, cache=prepared.new_cache()), before)
    with pytest.raises(ValueError, match="cannot be trained; train the original"):
        prepared.train()
    with pytest.raises(UsageError, match="already converted to int4"):
        prepare_for_inference(prepared, "int8")
    with pytest.raises(
        ValueError, match="float32 of 64 numbers on the CPU, not torch.float32 of 1"
    ):
        prepared.head(torch.randn(1, 128))
    with pytest.raises(TypeError, match="converted to int4 cannot change its dtype"):
        prepared.half()


def test_hooks_of_the_one_are_not_the_others():
    plain, called = model_of(), []
    prepared = prepare_for_inference(plain, "float32")
    prepared.norm.register_forward_hook(lambda *call: called.append(call))
    plain(some_tokens(1, 3))
    assert not called


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "foo"}, {"weights": None}, {"weights": ["int8"]}, {"model": {"bias": "no"}},
        {"model": {"vocab_size": 0}}, {"model": {"activation": "foo"}}, {"model": {"n_inner": 1.5}},
        {"model": {"n_layer": 3}}, {"format": 2}, {"sha256": None}, {"model": {"what": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_packed_folder_that_says_something_else_is_refused(change, tmp_path):
    folder = tmp_path / "packed"
    save_packed(prepare_for_inference(model_of(), "int8"), ByteTokenizer(), folder)
    meta = json.loads((folder / DESCRIBED).read_text())
    model = meta["model"] | change.pop("model", {})
    (folder / DESCRIBED).write_text(json.dumps(meta | change | {"model": model}))
    with pytest.raises(UsageError, match="packed"):
        gpt.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_folder_that_asks_for_more_than_it_holds_is_refused_at_once(
    kind, tmp_path, monkeypatch
):
    folder = tmp_path / "packed"
    save_packed(prepare_for_inference(model_of(), kind), ByteTokenizer(), folder)
    meta = json.loads((folder / DESCRIBED).read_text())

    def built(*arguments):
        raise AssertionError("a model is packed")

    monkeypatch.setattr("gpt.interop.packed.InferenceGPT.of", built)
    for name, asked, said in [
        ("n_layer", 10**9, "n_layer is 1000000000, and model.safetensors has 2 blocks"),
        ("n_layer", 1, "n_layer is 1, and model.safetensors has 2 blocks"),
        ("n_inner", 10**12, "blocks.0.mlp.up.matrix.data of shape [1000000000000, "),
        ("vocab_size", 10**12, "embed.matrix.data of shape [1000000000000, "),
        ("vocab_size", 10**400, "model.vocab_size has 1,329 bits, and must be below 2**63"),
        ("context_length", 10**12, "position.weight of shape [1000000000000, 64]"),
        ("n_embd", 2 * 10**12, "the model is too large to be built ("),
        ("n_inner", 2**63 - 1, "the model is too large to be built ("),
    ]:
        (folder / DESCRIBED).write_text(json.dumps(meta | {"model": meta["model"] | {name: asked}}))
        with pytest.raises(UsageError, match=re.escape(said)) as error:
            load_packed(folder)
        assert str(error.value).startswith(str(folder / DESCRIBED))
        assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '"text"', "null", "{", "[" * 100_000, '{"format": ' + "9" * 5000 + "}",
     '{"format": 1, "model": []}', '{"format": 1, "model": {"norm_eps": NaN}}', "\ud800"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_packed_json_of_any_content_ends_in_a_sentence(text, tmp_path):
    folder = tmp_path / "packed"
    save_packed(prepare_for_inference(model_of(), "int8"), ByteTokenizer(), folder)
    (folder / DESCRIBED).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=DESCRIBED):
        load_packed(folder)


def test_a_packed_model_with_another_models_tokenizer_is_refused(tmp_path):
    packed = prepare_for_inference(model_of(vocab_size=100), "int8")
    save_packed(packed, ByteTokenizer(), tmp_path / "packed")
    with pytest.raises(UsageError, match="tokenizer .*25[67].* 100"):
        gpt.load(tmp_path / "packed")


@pytest.mark.parametrize("weights", ["a folder", "a pipe", "empty", "cut"])
def test_packed_weights_that_are_no_such_file_are_refused(weights, tmp_path):
    folder = tmp_path / "packed"
    save_packed(prepare_for_inference(model_of(), "int8"), ByteTokenizer(), folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if weights == "a folder":
        path.mkdir()
    elif weights == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(data[:200] if weights == "cut" else b"")
    with pytest.raises(UsageError, match="model.safetensors (is a|cannot be read)"):
        load_packed(folder)


def test_a_full_disk_while_a_packed_model_is_saved_is_said_and_leaves_nothing(tmp_path):
    prepared = prepare_for_inference(model_of(), "int8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # a file takes no more
    try:
        with pytest.raises(UsageError, match="out/packed cannot be written: .*[Ff]ile too large"):
            save_packed(prepared, ByteTokenizer(), tmp_path / "out/packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").iterdir())


def test_a_packed_folder_has_the_users_umask(tmp_path):
    prepared = prepare_for_inference(model_of(), "int8")
    before = os.umask(0o027)
    try:
        save_packed(prepared, ByteTokenizer(), tmp_path / "packed")
    finally:
        os.umask(before)
    assert (tmp_path / "packed").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "packed").iterdir()} == {0o640}


def test_formats_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(UsageError, match="weights is 'int5', and must be one of auto, float32"):
        gpt.load(tmp_path, weights="int5")
    with pytest.raises(UsageError, match="a format needs --to packed"):
        ExportConfig(model="m", out=tmp_path, weights="int4")


def test_packed_weights_that_are_damaged_or_meant_for_something_else_are_refused(tmp_path):
    folder = tmp_path / "packed"
    save_packed(prepare_for_inference(model_of(), "int8"), ByteTokenizer(), folder)
    with pytest.raises(UsageError, match="exists already; name a new folder"):
        save_packed(prepare_for_inference(model_of(), "int8"), ByteTokenizer(), folder)
    with pytest.raises(UsageError, match="weights is 'int4', and .* is packed in int8"):
        gpt.load(folder, weights="int4")
    assert gpt.load(folder, weights="auto").model.weights == "int8"
    with pytest.raises(UsageError, match="is packed, and can only be run"):
        gpt.load(folder, trainable=True)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9] + b"x" + weights[-8:])
    with pytest.raises(UsageError, match=r"model.safetensors is damaged"):
        load_packed(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model.safetensors cannot be read"):
        load_packed(folder)
    (folder / DESCRIBED).write_text("{}")
    with pytest.raises(UsageError, match=r"packed.json is broken"):
        load_packed(folder)


def test_load_takes_the_format_of_the_weights(tmp_path):
    from tests.test_cli import RUN

    for kind in KINDS:
        model = gpt.load(RUN, weights=kind).model
        assert model.weights == model.head.matrix.kind == kind
    assert gpt.load(RUN, weights="auto").model.weights in ("float32", "bfloat16")


def test_the_number_of_threads_does_not_change_a_text():
    program = (
        "import sys, torch, gpt; torch.set_num_threads(int(sys.argv[1]));"
        "from tests.generation.test_inference import model_of, some_tokens;"
        "from gpt.generation.decode import decode; from gpt.config import GenerationConfig;"
        "m = gpt.prepare_for_inference(model_of(n_embd=256, n_head=4), 'int8');"
        "c = GenerationConfig(temperature=0, max_new_tokens=30);"
        "print([t.id for t in decode(m, some_tokens(1, 5).tolist(), c)])"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", program, threads],
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "2")
    ]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_biases_have_the_dtype_of_the_products_where_there_are_no_kernels(weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(inference, "_check_triton", lambda kind, device: None)
    prepared = gpt.prepare_for_inference(model_of(), weights, device=torch.device("cuda"))
    linears = [m for m in prepared.modules() if isinstance(m, PackedLinear)]
    assert {linear.bias.dtype for linear in linears if linear.bias is not None} == {torch.bfloat16}
