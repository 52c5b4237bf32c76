"""The law: decoding with the cache gives the full forward's logits, whatever the chunking."""

import dataclasses
import random
import re

import pytest
import torch

from gpt.config import ModelConfig
from gpt.model.cache import KVCache
from tests.conftest import make_model

CONTEXT = 16
KINDS = [False, True]
VARIANTS = {
    "gpt2": {},
    "grouped-query": {"n_kv_head": 2},
    "multi-query": {"n_kv_head": 1},
    "no bias": {"bias": False},
    "untied": {"tie_embeddings": False},
    "one layer": {"n_layer": 1},
    "narrow, relu": {"n_inner": 40, "activation": "relu"},
    "unscaled, by layer": {"scale_attention": False, "scale_attention_by_layer": True},
}


def ragged(length: int, seed: int) -> list[int]:
    draw, chunks = random.Random(seed), []
    while sum(chunks) < length:
        chunks.append(min(draw.randint(1, 5), length - sum(chunks)))
    return chunks


CHUNKINGS = {
    "ones": [1] * CONTEXT,
    "threes": [3] * 5 + [1],
    "whole": [CONTEXT],
    "prefill, then ones": [7] + [1] * 9,
    "prefill, then the rest": [7, 9],
    **{f"ragged {seed}": ragged(CONTEXT, seed) for seed in range(3)},
    "short of the context": [4, 1, 1, 5],
}


def model_of(variant: str, dtype: torch.dtype = torch.float32):
    config = ModelConfig(vocab_size=61, context_length=CONTEXT, n_layer=3, n_head=4, n_embd=32)
    return make_model(dataclasses.replace(config, **VARIANTS[variant]), dtype=dtype)


def some_tokens(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_cached_logits_are_the_full_forwards(kind, variant, batch_size, chunks):
    model = model_of(variant)
    tokens = some_tokens(batch_size, sum(chunks))
    cache = model.new_cache(batch_size, on_device=kind)
    cached = [model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)]
    full = model(tokens)
    # relative to the logits' size, which the tests' large weights make about 10
    torch.testing.assert_close(torch.cat(cached, 1), full, rtol=0, atol=1e-5 * full.abs().max())
    assert cache.length == sum(chunks)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_of_unequal_lengths_give_each_its_own_full_forwards_logits(kind, variant):
    model = model_of(variant)
    rows = [some_tokens(1, n, seed=n)[0] for n in (9, 3, 14)]
    cache = model.new_cache(3, on_device=kind)
    got = [[], [], []]
    for chunk in ([5, 2, 1], [1, 1, 1], [1, 0, 1], [0, 0, 8], [2, 0, 3]):
        before, longest = cache.lengths, max(chunk)
        padded = torch.full((3, longest), 60)
        for row, (start, n) in enumerate(zip(before, chunk, strict=True)):
            padded[row, :n] = rows[row][start : start + n]
        logits = model(padded, cache=cache)
        cache.truncate([start + n for start, n in zip(before, chunk, strict=True)])
        for row, n in enumerate(chunk):
            got[row].append(logits[row, :n])
    assert cache.lengths == [9, 3, 14]
    for row, tokens in enumerate(rows):
        full = model(tokens[None])[0]
        torch.testing.assert_close(
            torch.cat(got[row]), full, rtol=0, atol=1e-5 * float(full.abs().max())
        )


@torch.inference_mode()
def test_a_compiled_forward_over_a_static_cache_is_one_graph_for_every_length():
    model, tokens = model_of("gpt2"), some_tokens(2, CONTEXT)
    cache = model.new_cache(2, on_device=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(model, backend=backend, fullgraph=True)
    model(tokens[:, :4], cache=cache)
    logits = [forward(token, cache=cache) for token in tokens[:, 4:].split(1, dim=1)]
    torch._dynamo.reset()
    assert len(graphs) == 1
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens)[:, 4:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("variant", ["gpt2", "grouped-query"])
@torch.inference_mode()
def test_the_law_holds_in_bfloat16_to_its_rounding(variant, chunks):
    model = model_of(variant, torch.bfloat16)
    exact = model_of(variant)(some_tokens(2, sum(chunks)))
    tokens = some_tokens(2, sum(chunks))
    cache = model.new_cache(2)
    assert cache.dtype == torch.bfloat16
    cached = torch.cat([model(c, cache=cache) for c in tokens.split(chunks, dim=1)], 1)
    # bfloat16 keeps 8 bits: the cached logits are as near to float32's as the full forward's are
    full_error = (model(tokens).float() - exact).abs().max()
    assert (cached.float() - exact).abs().max() < 2 * full_error
    assert full_error < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_cache_takes_exactly_the_context_and_refuses_one_token_more(kind):
    model = model_of("gpt2")
    cache = model.new_cache(on_device=kind)
    model(some_tokens(1, CONTEXT), cache=cache)
    with pytest.raises(ValueError, match=r"holds 16 of 16 tokens, and 1 more do not fit"):
        model(some_tokens(1, 1), cache=cache)
    assert cache.length == CONTEXT


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_cache_of_less_capacity_refuses_what_does_not_fit(kind):
    model = model_of("gpt2")
    cache = model.new_cache(capacity=5, on_device=kind)
    model(some_tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="holds 4 of 5 tokens, and 2 more do not fit"):
        model(some_tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="4 tokens, which do not fit a capacity of 3"):
        cache.expand(2, capacity=3)


@pytest.mark.parametrize("capacity", [0, CONTEXT + 1])
def test_a_capacity_that_the_model_cannot_use_is_refused(capacity):
    with pytest.raises(ValueError, match=rf"capacity is {capacity}"):
        KVCache(ModelConfig(context_length=CONTEXT), capacity=capacity)


@pytest.mark.parametrize("kept", [0, 1, 6, 9])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_after_truncate_the_cache_is_one_of_the_kept_tokens_alone(kind, kept):
    model = model_of("gpt2")
    tokens, others = some_tokens(2, 9), some_tokens(2, 4, seed=1)
    cache = model.new_cache(2, on_device=kind)
    model(tokens, cache=cache)
    cache.truncate(kept)
    got = model(others, cache=cache)
    expected = model(torch.cat([tokens[:, :kept], others], 1))[:, kept:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [-1, 4])
def test_truncate_refuses_a_length_that_the_cache_does_not_have(length, tiny_model):
    cache = tiny_model.new_cache()
    cache.advance(cache.plan(3))
    with pytest.raises(ValueError, match=f"3 tokens to {length}"):
        cache.truncate(length)


def test_truncate_wants_a_length_for_each_row(tiny_model):
    cache = tiny_model.new_cache(3)
    with pytest.raises(ValueError, match="shorter"):
        cache.truncate([0, 0])


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 0], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_after_reorder_each_row_continues_the_row_it_came_from(kind, rows):
    model = model_of("gpt2")
    tokens, others = some_tokens(3, 6), some_tokens(3, 3, seed=1)
    cache = model.new_cache(3, on_device=kind)
    model(tokens, cache=cache)
    cache.reorder(torch.tensor(rows))
    got = model(others, cache=cache)
    expected = model(torch.cat([tokens[rows], others], 1))[:, 6:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 0, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_of_unlike_lengths_move_whole(kind, rows):
    model = model_of("gpt2")
    tokens, others = some_tokens(2, 7), some_tokens(3, 2, seed=1)
    cache = model.new_cache(3, on_device=kind)
    cache.reorder([0, 1])
    model(tokens, cache=cache)
    cache.truncate([7, 3])
    cache.reorder(rows)
    got = model(others[: len(rows)], cache=cache)
    for i, row in enumerate(rows):
        text = torch.cat([tokens[row, : [7, 3][row]], others[i]])[None]
        torch.testing.assert_close(got[i], model(text)[0, -2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_expand_gives_each_row_n_times_side_by_side_and_leaves_the_old_cache_alone(kind):
    model = model_of("gpt2")
    tokens, others = some_tokens(2, 6), some_tokens(6, 3, seed=1)
    cache = model.new_cache(2, on_device=kind)
    model(tokens, cache=cache)
    wide = cache.expand(3)
    assert (wide.batch_size, wide.length, wide.capacity) == (6, 6, CONTEXT)
    got = model(others, cache=wide)
    expected = model(torch.cat([tokens.repeat_interleave(3, 0), others], 1))[:, 6:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (cache.batch_size, cache.length) == (2, 6)
    got = model(others[:2], cache=cache)
    expected = model(torch.cat([tokens, others[:2]], 1))[:, 6:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_leave_and_others_take_their_place(kind):
    model = model_of("gpt2")
    tokens, new, others = some_tokens(3, 6), some_tokens(2, 4, seed=1), some_tokens(3, 3, seed=2)
    cache, arriving = model.new_cache(3, on_device=kind), model.new_cache(2)
    model(tokens, cache=cache)
    model(new, cache=arriving)
    cache.reorder([2])
    cache.add(arriving)
    assert cache.lengths == [6, 4, 4]
    got = model(others, cache=cache)
    for row, before in enumerate((tokens[2], new[0], new[1])):
        whole = torch.cat([before, others[row]])[None]
        torch.testing.assert_close(got[row], model(whole)[0, len(before) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_mask_becomes_a_bias_of_the_keys_dtype_once_a_forward(kind, dtype, monkeypatch):
    model, masks = model_of("gpt2", dtype), []
    fused = torch.nn.functional.scaled_dot_product_attention

    def kept(q, k, v, **options):
        masks.append(options["attn_mask"])
        return fused(q, k, v, **options)

    monkeypatch.setattr("gpt.model.attend.F.scaled_dot_product_attention", kept)
    cache = model.new_cache(2, on_device=kind)
    model(some_tokens(2, 5), cache=cache)
    cache.truncate([5, 3])
    masks.clear()
    model(some_tokens(2, 2), cache=cache)
    assert len(masks) == 3  # one a layer
    assert len({mask.data_ptr() for mask in masks}) == 1
    bias = masks[0]
    assert bias.dtype == cache.dtype
    assert all(stride % 16 == 0 for stride in bias.stride()[:-1])
    looks = [[True] * 6 + [False], [True] * 7], [[True] * 4 + [False] * 3, [True] * 5 + [False] * 2]
    assert (bias[:, 0, :, :7] == 0).tolist() == list(looks)
    assert set(bias.flatten().tolist()) == {0.0, -torch.inf}


@pytest.fixture
def waits(monkeypatch):
    """The tensors that the host has read."""
    read = []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(self) or item(self))
    return read


@pytest.mark.parametrize(
    ("operation", "reads"),
    [
        (lambda cache: cache.reorder([0, 1, 2]), 0),
        (lambda cache: cache.batch_size, 0),
        (lambda cache: cache.reorder([0, 1]), 1),
        (lambda cache: cache.reorder([2, 0, 1]), 1),
        (lambda cache: cache.truncate([1, 2, 3]), 1),
        (lambda cache: cache.length, 1),
        (lambda cache: cache.expand(2), 1),
        (lambda cache: cache.plan(2), 1),  # on a CPU, where it checks that they fit
    ],
    ids=["same", "size", "drop", "turn", "truncate", "length", "expand", "plan"],
)
def test_an_operation_of_a_static_cache_reads_its_lengths_once_at_most(
    operation, reads, waits, tiny_model
):
    cache = tiny_model.new_cache(4, on_device=True)
    cache.reorder([0, 1, 2])
    cache.advance(cache.plan(5))
    waits.clear()
    operation(cache)
    assert len(waits) == reads


def test_adding_rows_to_a_static_cache_reads_each_caches_lengths_once(waits, tiny_model):
    cache, arriving = (tiny_model.new_cache(2, on_device=True) for _ in range(2))
    cache.reorder([0])
    waits.clear()
    cache.add(arriving, [1])
    assert len(waits) == 2


@torch.inference_mode()
def test_a_forward_over_a_static_cache_on_a_device_reads_nothing(tiny_model):
    model = tiny_model.to("meta")  # where nothing can be read
    cache = model.new_cache(3, on_device=True)
    for _ in range(4):
        cache.reorder([0, 1, 2])
        assert model(some_tokens(3, 1).to("meta"), cache=cache).shape == (3, 1, 61)


@torch.inference_mode()
def test_the_cache_takes_its_memory_once(tiny_model):
    cache = tiny_model.new_cache(2)
    [store] = cache.stores.values()
    before = store.keys.data_ptr(), store.values.data_ptr()
    for _ in range(16):
        tiny_model(some_tokens(2, 1), cache=cache)
    assert (store.keys.data_ptr(), store.values.data_ptr()) == before


def test_grouped_query_attention_makes_the_cache_smaller():
    config = ModelConfig(n_layer=1, n_head=12, n_kv_head=3)
    assert KVCache(config, capacity=2).nbytes * 4 == (
        KVCache(dataclasses.replace(config, n_kv_head=0), capacity=2).nbytes
    )


def test_rows_and_copies_that_make_no_sense_are_refused(tiny_model):
    cache = tiny_model.new_cache(3)
    for rows in ([3], [0, -1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match=re.escape(f"rows is {rows}, and must name up to 3")):
            cache.reorder(rows)
    with pytest.raises(ValueError, match="1 rows of up to 0 tokens do not fit beside 3"):
        cache.add(tiny_model.new_cache())
    with pytest.raises(ValueError, match="cannot expand a cache by 0"):
        cache.expand(0)


def test_what_a_cache_makes_is_on_its_device(tiny_config):
    cache, other = (KVCache(tiny_config, batch_size=3, device="meta") for _ in range(2))
    cache.lengths = [3, 1]
    plan = cache.plan(2)
    [slots] = plan.slots.values()
    assert {plan.at.device.type, slots.keys.device.type} == {"meta"}
    k = torch.zeros(2, 4, 2, 8, device="meta")
    assert {x.device.type for x in cache.append(0, k, k, plan)} == {"meta"}
    cache.reorder([1, 0])
    cache.add(other, [2])
    assert {cache.device.type, cache.expand(2).device.type} == {"meta"}
    cache.lengths = [3, 3]
    assert cache.plan(2).at.device.type == "meta"


def test_rows_as_a_tensor_are_read_once(waits, tiny_model):
    cache = tiny_model.new_cache(3)
    cache.lengths = [1, 2, 3]
    cache.reorder(torch.tensor([2, 0, 0]))
    assert len(waits) == 1
    assert cache.lengths == [3, 1, 1]


def test_a_row_that_fills_the_capacity_may_be_added(tiny_config):
    cache, full = (KVCache(tiny_config, capacity=4) for _ in range(2))
    cache.reorder([])
    full.layer(0)[0].keys += 1
    full.lengths = [4]
    cache.add(full)
    assert cache.lengths == [4]
    assert (cache.layer(0)[0].keys == 1).all()
    cache.reorder([])
    longer = KVCache(tiny_config, capacity=5)
    longer.lengths = [5]
    with pytest.raises(ValueError, match="1 rows of up to 5 tokens do not fit beside 0"):
        cache.add(longer)


def test_square_causal_and_single_queries_need_no_mask(tiny_model):
    cache = tiny_model.new_cache()

    def mask(n):
        [view] = tiny_model.new_shared(some_tokens(1, n), cache).views.values()
        return view.mask

    assert mask(3) is None
    cache.advance(cache.plan(3))
    assert mask(1) is None
    assert mask(2).shape == (2, 5)


@torch.inference_mode()
def test_a_forward_of_padded_rows_moves_these_and_writes_nothing_else_in_use(tiny_model):
    tokens = some_tokens(2, 6)
    cache = tiny_model.new_cache(3, on_device=True)
    cache.reorder([0, 1])
    tiny_model(tokens[:, :5], cache=cache)
    padded = cache.padded(3)
    assert padded.lengths == [5, 5, 0]
    logits = tiny_model(torch.cat([tokens[:, 5:], tokens[:1, 5:]]), cache=padded)
    assert cache.lengths == [6, 6]
    full = tiny_model(tokens)[:, 5:]
    torch.testing.assert_close(logits[:2], full, rtol=0, atol=1e-5 * float(full.abs().max()))
    assert cache.padded(2).lengths == [6, 6]
    for rows in (1, 4):
        with pytest.raises(
            ValueError, match=f"2 rows, with memory for 3, cannot be padded to {rows}"
        ):
            cache.padded(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_may_be_added_and_expanded(kind, tiny_config):
    cache, empty = (KVCache(tiny_config, batch_size=2, on_device=kind) for _ in range(2))
    empty.reorder([])
    cache.add(empty)
    assert cache.lengths == [0, 0]
    assert empty.expand(3).lengths == []


def test_a_cache_works_under_another_default_device(tiny_config):
    cache, other = (KVCache(tiny_config, batch_size=3) for _ in range(2))
    k = torch.arange(1.0, 4).view(3, 1, 1, 1).expand(3, 4, 2, 8)
    with torch.device("meta"):
        for lengths in ([3, 1, 2], [3, 3, 3]):
            cache.lengths = lengths
            plan = cache.plan(2)
            assert plan.at.device.type == "cpu"
            cache.append(0, k, k, plan)
            cache.advance(plan)
        cache.reorder([1, 0])
        cache.add(other, [2])
        assert cache.expand(2).lengths == [5, 5, 5, 5, 0, 0]
    assert cache.layer(0)[0].keys[0, :2, 0, 4, 0].tolist() == [2, 1]


@torch.inference_mode()
def test_a_truncated_cache_fits_wherever_what_it_still_holds_fits(tiny_model):
    cache, tokens = tiny_model.new_cache(), some_tokens(1, 16)
    tiny_model(tokens, cache=cache)
    cache.truncate(5)
    smaller = tiny_model.new_cache(2, capacity=7)
    smaller.reorder([])
    smaller.add(cache)
    full = tiny_model(tokens[:, :6])[:, 5:]
    for other in (cache.expand(1, capacity=7), smaller):
        got = tiny_model(tokens[:, 5:6], cache=other)
        torch.testing.assert_close(got, full, rtol=0, atol=1e-5 * float(full.abs().max()))
