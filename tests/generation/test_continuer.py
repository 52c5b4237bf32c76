"""What the decoder, the beam search and the speculator have in common."""

import dataclasses

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig
from gpt.generation.beam import BeamSearch
from gpt.generation.decode import Decoder
from gpt.generation.speculative import DraftModel, PromptLookup, Speculator
from gpt.model.gpt import GPT
from tests.conftest import make_model

SHAPE = ModelConfig(
    vocab_size=61, context_length=48, n_layer=2, n_head=2, n_embd=32, tie_embeddings=False
)  # fmt: skip
GREEDY = GenerationConfig(temperature=0, max_new_tokens=9)


def speculator(model, config, draft, **options):
    return Speculator(model, config, draft, num_draft_tokens=3, **options)


MAKE = {
    "decoder": Decoder,
    "beams": lambda model, config, **options: BeamSearch(
        model, dataclasses.replace(config, num_beams=3), **options
    ),
    "look-up": lambda model, config, **options: speculator(
        model, config, PromptLookup(), **options
    ),
    "draft": lambda model, config, **options: speculator(
        model, config, DraftModel(model, config), **options
    ),
}
MAKERS = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
PROMPTS = [[*range(30), end, 7] for end in (40, 50)]  # with a shared beginning


def varied(**changes):
    """A model with varied likeliest tokens."""
    model = make_model(dataclasses.replace(SHAPE, **changes))
    with torch.no_grad():
        model.position.weight.mul_(10)
        model.norm.bias.zero_()
    return model


def written(continuer):
    for prompt in PROMPTS:
        continuer.add(prompt)
    texts = [[] for _ in PROMPTS]
    while continuer.busy:
        for token in continuer.advance():
            texts[token.sequence].append(token.id)
    return texts


@MAKERS
@pytest.mark.parametrize("window", [0, 5])
def test_no_forward_pass_reads_more_of_a_prompt_than_the_limit(make, window, monkeypatch):
    model = varied(window=window)
    expected = written(make(model, GREEDY))
    sizes = []
    features = GPT.features

    def counted(self, tokens, **options):
        sizes.append(tokens.numel())
        return features(self, tokens, **options)

    monkeypatch.setattr("gpt.generation.prefill.PREFILL", 7)
    monkeypatch.setattr(GPT, "features", counted)
    assert written(make(model, GREEDY)) == expected
    assert max(sizes) <= 7


@MAKERS
def test_nothing_to_continue_gives_no_tokens(make):
    continuer = make(varied(), GREEDY)
    assert continuer.advance() == []
    written(continuer)
    assert not continuer.busy
    assert continuer.advance() == []


@pytest.mark.parametrize("min_new_tokens", [0, 4])
@MAKERS
def test_any_of_several_ids_ends_a_text(make, min_new_tokens):
    model = varied()
    config = dataclasses.replace(GREEDY, min_new_tokens=min_new_tokens)
    ids = [*range(0, SHAPE.vocab_size, 2)]
    continuer = make(model, config, end_of_text=ids)
    continuer.add(PROMPTS[0])
    tokens = []
    while continuer.busy:
        tokens += continuer.advance()
    assert tokens[-1].ended == "end_of_text"
    assert tokens[-1].id in ids
    assert len(tokens) > min_new_tokens
    assert not {token.id for token in tokens[:-1]} & set(ids)


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"copy": "pointer"}])
@MAKERS
def test_the_details_of_a_prompt_are_those_of_the_full_forward(make, changes, monkeypatch):
    monkeypatch.setattr("gpt.generation.prefill.PREFILL", 7)
    monkeypatch.setattr("gpt.generation.logprobs.POSITIONS_AT_ONCE", 5)
    model = varied(**changes)
    continuer = make(model, dataclasses.replace(GREEDY, logprobs=2))
    alike, others = [*PROMPTS, PROMPTS[0][:29]], [[3], [*range(40, 45)], PROMPTS[1]]
    found = {}
    for prompts in (alike, others):  # the first ones are read from their shared beginning on
        for prompt in prompts:
            continuer.add(prompt)
        while continuer.busy:
            for token in continuer.advance():
                if token.prompt_details is not None:
                    assert token.sequence not in found
                    found[token.sequence] = token.prompt_details
    for number, prompt in enumerate(alike + others):
        assert len(found[number]) == len(prompt) - 1
        with torch.no_grad():
            every = model(torch.tensor([prompt]))[0].log_softmax(-1)
        for own, logprobs, token in zip(found[number], every, prompt[1:], strict=False):
            assert own.logprob == pytest.approx(logprobs[token].item(), abs=1e-5)
            assert own.entropy == pytest.approx(-(logprobs.exp() @ logprobs).item(), abs=1e-4)
            best = logprobs.topk(2)
            assert [i for i, _ in own.top] == best.indices.tolist()
            assert [x for _, x in own.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@MAKERS
def test_log_probabilities_cost_no_second_reading_and_change_no_token(make, monkeypatch):
    model, counts = varied(), []
    features = GPT.features

    def counted(self, tokens, **options):
        counts.append(tokens.numel())
        return features(self, tokens, **options)

    monkeypatch.setattr(GPT, "features", counted)
    expected = written(make(model, GREEDY))
    without = sum(counts)
    counts.clear()
    assert written(make(model, dataclasses.replace(GREEDY, logprobs=0))) == expected
    # of a shared beginning both prompts read the last token themselves
    assert sum(counts) == without + (make is Decoder)
