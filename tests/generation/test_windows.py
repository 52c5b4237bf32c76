"""Decoding by models whose layers have an attention window."""

import dataclasses
import re

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.generation.beam import BeamSearch
from gpt.generation.decode import Decoder, decode
from gpt.generation.inference import prepare_for_inference
from gpt.generation.speculative import PromptLookup, Speculator
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


def written(model, prompts, config, **options):
    texts = [[] for _ in prompts]
    for token in decode(model, prompts, config, **options):
        texts[token.sequence].append(token.id)
    return texts


@pytest.mark.parametrize("position", ["rotary", "alibi", "none", "xpos", "sinusoidal"])
@pytest.mark.parametrize("options", [{}, {"ahead": 4}, {"batch_size": 2}])
@torch.inference_mode()
def test_sinks_write_without_end_what_full_forward_passes_write(position, options):
    model = make_model(dataclasses.replace(SHAPE, position=position), dtype=torch.float64)
    config = dataclasses.replace(GREEDY, past_context="sinks")
    expected = [endless(model, prompt, GREEDY.max_new_tokens) for prompt in PROMPTS]
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
    [{"window_pattern": "LG"}, {"window": 0, "sinks": 0}, {"position": "learned"}],
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
