"""What the decoder, the beam search and the speculator have in common."""

import dataclasses

import pytest

from gpt.config import GenerationConfig, ModelConfig
from gpt.generation.beam import BeamSearch
from gpt.generation.decode import Decoder
from gpt.generation.speculative import DraftModel, PromptLookup, Speculator
from gpt.model.gpt import GPT
from tests.conftest import make_model

SHAPE = ModelConfig(
    vocab_size=61, context_length=48, n_layer=2, n_head=2, n_embd=32, tie_embeddings=False,
    position="rotary",
)  # fmt: skip
GREEDY = GenerationConfig(temperature=0, max_new_tokens=9)
MAKE = {
    "decoder": lambda model: Decoder(model, GREEDY),
    "beams": lambda model: BeamSearch(model, dataclasses.replace(GREEDY, num_beams=3)),
    "look-up": lambda model: Speculator(model, GREEDY, PromptLookup(), num_draft_tokens=3),
    "draft": lambda model: Speculator(model, GREEDY, DraftModel(model, GREEDY), num_draft_tokens=3),
}
MAKERS = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
PROMPTS = [[*range(30), end, 7] for end in (40, 50)]  # with a shared beginning


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
    model = make_model(dataclasses.replace(SHAPE, window=window))
    expected = written(make(model))
    sizes = []
    features = GPT.features

    def counted(self, tokens, **options):
        sizes.append(tokens.numel())
        return features(self, tokens, **options)

    monkeypatch.setattr("gpt.generation.prefill.PREFILL", 7)
    monkeypatch.setattr(GPT, "features", counted)
    assert written(make(model)) == expected
    assert max(sizes) <= 7


@MAKERS
def test_nothing_to_continue_gives_no_tokens(make):
    continuer = make(make_model(SHAPE))
    assert continuer.advance() == []
    written(continuer)
    assert not continuer.busy
    assert continuer.advance() == []
