"""Decoding by models whose layers have an attention window."""

import dataclasses
import functools
import re

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.generation.beam import BeamSearch
from gpt.generation.decode import Decoder, decode
from gpt.generation.inference import prepare_for_inference
from gpt.generation.speculative import PromptLookup, Speculator
from gpt.model.gpt import GPT
from gpt.model.store import SPARE
from tests.conftest import make_model

SHAPE = ModelConfig(
    vocab_size=61, context_length=24, n_layer=2, n_head=2, n_embd=32, window=5, sinks=2,
    position="rotary",
)  # fmt: skip
GREEDY = GenerationConfig(temperature=0, max_new_tokens=2 * SPARE)
PROMPTS = [[5, 9, 3], [7] * 40, [1], list(range(30)), [5, 9, 3, 8]]


def endless(model, prompt, n):
    """Greedy tokens by full forward passes over the whole text, however long it is."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]), last_only=True)[0, -1].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def exact(position):
    """A model, and what it writes without end."""
    model = make_model(dataclasses.replace(SHAPE, position=position), dtype=torch.float64)
    return model, [endless(model, prompt, GREEDY.max_new_tokens) for prompt in PROMPTS]


def written(model, prompts, config, **options):
    texts = [[] for _ in prompts]
    for token in decode(model, prompts, config, **options):
        texts[token.sequence].append(token.id)
    return texts


@pytest.mark.parametrize("position", ["rotary", "alibi", "none", "sinusoidal"])
@pytest.mark.parametrize("options", [{}, {"ahead": 4}, {"batch_size": 2}])
@torch.inference_mode()
def test_sinks_write_without_end_what_full_forward_passes_write(position, options):
    model, expected = exact(position)
    config = dataclasses.replace(GREEDY, past_context="sinks")
    assert written(model, PROMPTS, config, **options) == expected


@torch.inference_mode()
def test_the_kernels_write_the_same_without_end():
    model = make_model(SHAPE)
    config = dataclasses.replace(GREEDY, past_context="sinks")
    prepared = prepare_for_inference(model, "float32")
    assert written(prepared, PROMPTS, config) == written(model, PROMPTS, config)


def test_the_memory_of_windows_does_not_grow_with_the_text():
    model = make_model(SHAPE)
    sizes = [model.new_cache(capacity=n).nbytes for n in (10, 1000, 10**9)]
    assert sizes[1] == sizes[2] == 2 * 2 * 2 * 16 * 4 * (5 + 2 + SPARE)  # K and V, layers, heads
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"window_pattern": "LG"},
        {"window": 0, "sinks": 0},
        {"position": "learned"},
        {"position": "xpos"},
    ],
    ids=str,
)
def test_a_model_that_has_to_see_or_number_everything_is_refused(changes):
    model = make_model(dataclasses.replace(SHAPE, **changes))
    config = dataclasses.replace(GREEDY, past_context="sinks")
    with pytest.raises(UsageError, match="past_context is 'sinks', which needs model.window in"):
        Decoder(model, config)
    with pytest.raises(UsageError, match=re.escape("use 'slide' or 'stop'")):
        Speculator(model, config, PromptLookup())


@pytest.mark.parametrize("past_context", ["slide", "stop"])
@torch.inference_mode()
def test_the_other_policies_and_shared_beginnings_work_with_windows_too(past_context):
    model = make_model(dataclasses.replace(SHAPE, context_length=100), dtype=torch.float64)
    config = dataclasses.replace(GREEDY, past_context=past_context)
    start = list(range(60)) + list(range(30))
    prompts = [[*start, i] for i in range(3)] + [start[:20]] + [[*start[:12], 8]]
    alone = [written(model, [prompt], config)[0] for prompt in prompts]
    assert written(model, prompts, config) == alone
    assert alone[3][:80] == endless(model, prompts[3], 80)


@pytest.mark.parametrize("num_draft_tokens", [3, SPARE + 20])
@torch.inference_mode()
def test_speculation_writes_the_same_even_when_a_guess_is_longer_than_a_ring(num_draft_tokens):
    model = make_model(dataclasses.replace(SHAPE, context_length=300), dtype=torch.float64)
    prompt = [5, 9, 3] * 60
    speculator = Speculator(model, GREEDY, PromptLookup(), num_draft_tokens=num_draft_tokens)
    tokens = [token.id for token in speculator.decode(prompt)]
    assert tokens[:120] == endless(model, prompt, 128)[:120]
    assert speculator.accepted < speculator.guesses


@torch.inference_mode()
def test_beams_keep_their_windows():
    model = make_model(dataclasses.replace(SHAPE, context_length=100))
    full = make_model(dataclasses.replace(SHAPE, context_length=100, window=100, sinks=0))
    for one in (model, full):
        config = GenerationConfig(temperature=0, num_beams=3, max_new_tokens=60)
        search = BeamSearch(one, config)
        search.add([5, 9, 3])
        tokens = []
        while search.busy:
            tokens += search.advance()
        text = torch.tensor([[5, 9, 3] + [token.id for token in tokens]])
        logprobs = one(text)[0].log_softmax(-1)
        total = sum(float(logprobs[i + 2, token.id]) for i, token in enumerate(tokens))
        assert tokens[-1].score == pytest.approx(total / len(tokens), rel=1e-4)


@pytest.mark.parametrize("position", ["rotary", "alibi", "none"])
@torch.inference_mode()
def test_sinks_count_however_far_they_are(position):
    model = make_model(dataclasses.replace(SHAPE, position=position))
    text = torch.randint(61, (1, 3000))
    other = text.clone()
    other[0, :2] = (other[0, :2] + 7) % 61
    difference = (model(text) - model(other))[0].abs().amax(dim=-1)
    assert difference[2990:].min() > 0.1 * difference[30:60].mean()


@torch.inference_mode()
def test_there_may_be_more_sinks_than_tokens():
    many = make_model(dataclasses.replace(SHAPE, context_length=1024, sinks=300))
    whole = make_model(dataclasses.replace(SHAPE, context_length=1024, window=0, sinks=0))
    text = torch.randint(61, (1, 290))
    torch.testing.assert_close(many(text), whole(text), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_ring_that_was_emptied_forgets_how_full_it_was():
    model = make_model(dataclasses.replace(SHAPE, context_length=1000), dtype=torch.float64)
    cache, text = model.new_cache(), torch.randint(61, (1, 20))
    model(torch.randint(61, (1, 200)), cache=cache)
    cache.truncate(0)
    model(text, cache=cache)
    cache.truncate(19)
    got = model(text[:, 19:], cache=cache)
    torch.testing.assert_close(got, model(text)[:, 19:], rtol=0, atol=1e-9)


@torch.inference_mode()
def test_speculation_after_a_slide_reads_no_more_than_without_windows(monkeypatch):
    read = []
    features = GPT.features
    monkeypatch.setattr(
        GPT, "features", lambda self, x, **more: read.append(x.numel()) or features(self, x, **more)
    )
    counts = []
    for changes in ({}, {"window": 0, "sinks": 0}):
        model = make_model(dataclasses.replace(SHAPE, context_length=120, **changes))
        read.clear()
        list(Speculator(model, GREEDY, PromptLookup()).decode([5, 9, 3] * 10))
        counts.append(sum(read))
    assert counts[0] < 1.5 * counts[1]
