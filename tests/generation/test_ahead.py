"""Padded rows and kept loops. Instead of a CUDA graph, the tests call the captured function, which
like a graph works on the memory that it was made with.
"""

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch

from gpt.config import GenerationConfig
from gpt.generation import ahead
from gpt.generation.ahead import TokenLoop, padded_rows
from gpt.generation.decode import Decoder, decode
from gpt.model.cache import KVCache
from tests.conftest import make_model

PROMPTS = [[i, 2 * i, 3] for i in range(1, 9)]
CONFIG = GenerationConfig(temperature=1.0, seed=1, max_new_tokens=40, past_context="stop")


@pytest.fixture
def model(tiny_config):
    return new_model(tiny_config)


def new_model(config):
    """A model whose cache is small beside its weights."""
    return make_model(
        dataclasses.replace(config, context_length=64, n_kv_head=1, tie_embeddings=False)
    )


@pytest.fixture
def captured(monkeypatch):
    """The number of rows of each capture."""
    rows, pools = [], []

    def capture(call, device, pool):
        assert pool in pools
        call()
        call()  # as a real capture does
        held = [cell.cell_contents for cell in call.__closure__]
        rows.extend(cache.batch_size for cache in held if isinstance(cache, KVCache))
        return call

    monkeypatch.setattr(ahead, "can_capture", lambda device: True)
    monkeypatch.setattr(ahead, "new_pool", lambda: pools.append(object()) or pools[-1])
    monkeypatch.setattr(ahead, "capture", capture)
    return rows


def tokens_of(model, prompts, config=CONFIG, **options):
    rows = [[] for _ in prompts]
    for token in decode(model, prompts, config, **options):
        rows[token.sequence].append(token.id)
    return rows


@pytest.mark.parametrize(
    ("rows", "most", "padded"),
    [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 8), (8, 8, 8), (5, 6, 6), (9, 32, 16)],
)
def test_rows_are_padded_to_a_power_of_two_or_to_the_caches_rows(rows, most, padded):
    assert padded_rows(rows, most) == padded


@pytest.mark.parametrize("n", [1, 3, 5, 7, 8])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "bias": {5: 6.0}}], ids=str)
def test_padded_and_captured_rows_give_the_tokens_of_plain_decoding(settings, n, model, captured):
    config = dataclasses.replace(CONFIG, **settings)
    plain = tokens_of(model, PROMPTS[:n], config, end_of_text=5)
    assert len(set(map(len, plain))) > 1 or n < 5  # they end at different times
    assert tokens_of(model, PROMPTS[:n], config, end_of_text=5, ahead=16) == plain
    assert captured


@torch.inference_mode()
def test_padding_rows_change_no_row_in_use_and_leave_no_tokens(model):
    cache = model.new_cache(8, on_device=True)
    cache.reorder([0, 1, 2])
    model(torch.tensor(PROMPTS[:3]), cache=cache)
    cache.truncate([3, 1, 2])
    keys = cache.layer(0)[0].keys
    before = keys.clone()
    loop = TokenLoop(cache, CONFIG, vocab_size=61)
    for _ in range(2):
        loop.run(model, [1, 2, 3], [[0.5] * 3] * 4)
    assert cache.lengths == [11, 9, 10]
    for row, length in enumerate((3, 1, 2)):
        assert torch.equal(keys[:, row, :, :length], before[:, row, :, :length])
        assert keys[:, row, :, length : length + 8].abs().amax(dim=(0, 1, 3)).all()
    assert torch.equal(keys[:, 4:], before[:, 4:])  # behind the padding
    arriving = model.new_cache(1)
    model(torch.tensor(PROMPTS[3:4]), cache=arriving)
    cache.add(arriving)
    assert cache.lengths == [11, 9, 10, 3]


def test_a_cache_is_not_padded_beyond_its_memory(model):
    cache = model.new_cache(4, on_device=True)
    for rows in (3, 5):
        with pytest.raises(ValueError, match=f"memory for 4, cannot be padded to {rows}"):
            cache.padded(rows)


def test_one_capture_serves_all_numbers_of_rows_up_to_a_power_of_two(model, captured):
    decoder = Decoder(model, dataclasses.replace(CONFIG, max_new_tokens=60), ahead=4)
    for prompt in PROMPTS:
        decoder.add(prompt)
    for sequence in range(4):
        decoder.advance()
        decoder.end(sequence)
    while decoder.busy:
        decoder.advance()
    assert captured == [8, 4]


def test_the_next_texts_use_the_graphs_of_the_last_ones(model, captured):
    one = tokens_of(model, PROMPTS[:4], ahead=16)
    assert captured == [4]
    assert tokens_of(model, PROMPTS[:4], ahead=16) == one
    assert tokens_of(model, PROMPTS[:3], ahead=16) == one[:3]
    assert captured == [4]
    short = dataclasses.replace(CONFIG, max_new_tokens=3)
    assert tokens_of(model, PROMPTS[:1], short, ahead=16) == [one[0][:3]]
    assert captured == [4]


def test_graphs_of_other_settings_or_of_replaced_weights_are_not_used(model, captured):
    tokens_of(model, PROMPTS[:1], ahead=16)
    greedy = dataclasses.replace(CONFIG, temperature=0.0)
    expected = tokens_of(model, PROMPTS[:1], greedy)
    assert tokens_of(model, PROMPTS[:1], greedy, ahead=16) == expected
    assert captured == [1, 1]
    with torch.no_grad():
        model.head.weight = torch.nn.Parameter(model.head.weight.flip(0))
    assert tokens_of(model, PROMPTS[:1], greedy, ahead=16) == tokens_of(model, PROMPTS[:1], greedy)
    assert captured == [1, 1, 1]


def test_short_texts_are_captured_only_after_many_of_them(model, captured):
    short = dataclasses.replace(CONFIG, max_new_tokens=12)
    for _ in range(2):
        tokens_of(model, PROMPTS[:1], short, ahead=16)
    assert captured == []
    for _ in range(4):
        tokens_of(model, PROMPTS[:1], short, ahead=16)
    assert captured == [1]


def test_decoders_that_take_turns_have_separate_caches(model, captured):
    expected = tokens_of(model, PROMPTS[:2])
    tokens_of(model, PROMPTS[:1], ahead=4)  # leaves a cache
    decoders = [Decoder(model, CONFIG, ahead=4) for _ in range(2)]
    got = [[], []]
    for decoder, prompt in zip(decoders, PROMPTS, strict=False):
        decoder.add(prompt)
    while any(decoder.busy for decoder in decoders):
        for tokens, decoder in zip(got, decoders, strict=True):
            if decoder.busy:
                tokens += [token.id for token in decoder.advance()]
    assert got == expected


def test_a_decoder_continues_after_it_left_its_cache(model):
    decoder = Decoder(model, CONFIG, ahead=4)
    got = []
    for prompt in PROMPTS[:3]:
        decoder.add(prompt)
        got.append([])
        while decoder.busy:
            got[-1] += [token.id for token in decoder.advance()]
    assert got == tokens_of(model, PROMPTS[:3])


def kept_of(model):
    return ahead._kept.get(model)


def test_copies_and_pickles_of_a_model_have_no_kept_loop(model):
    tokens_of(model, PROMPTS[:1], ahead=4)
    assert kept_of(model) is not None
    assert kept_of(copy.deepcopy(model)) is None
    assert kept_of(pickle.loads(pickle.dumps(model))) is None


def test_a_kept_loop_ends_with_its_model(tiny_config):
    model = new_model(tiny_config)
    tokens_of(model, PROMPTS[:1], ahead=4)
    kept = weakref.ref(kept_of(model))
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None


def test_a_model_in_training_keeps_no_loop_nor_does_a_cache_larger_than_the_weights(model):
    model.train()
    tokens_of(model, PROMPTS[:1], ahead=4)
    assert kept_of(model) is None
    model.eval()
    tokens_of(model, PROMPTS * 8, ahead=4, batch_size=64)
    assert kept_of(model) is None
