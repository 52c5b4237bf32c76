"""A cache of 8 bits in every decoder, in evaluations, and on the command line."""

from pathlib import Path

import pytest
import torch

from gpt.config import EvaluateConfig, GenerationConfig, ModelConfig, SampleConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer
from gpt.evaluation.perplexity import score_text
from gpt.generation.beam import BeamSearch
from gpt.generation.checks import check_cache
from gpt.generation.decode import Decoder
from gpt.generation.inference import prepare_for_inference
from gpt.generation.speculative import DraftModel, PromptLookup, Speculator
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT
from gpt.model.store import Copied, Store
from tests.conftest import make_model
from tests.model.test_rounded_cache import as_float

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "tie_embeddings": False}
ROTARY = {"position": "rotary", "n_kv_head": 2}
MODELS = {
    "learned positions": {},
    "grouped heads": ROTARY,
    "window": ROTARY | {"window": 6},
    "sinks": ROTARY | {"window": 6, "sinks": 2},
    "pointer": ROTARY | {"copy": "pointer"},
}
PROMPTS = [[1, 2, 3] * 5, [1, 2, 3] * 4 + [7], [9]]
SETTINGS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3, "num_samples": 2},
    "past the context": {"max_new_tokens": 40},
    "beams": {"num_beams": 3},
    "with details": {"logprobs": 2},
}


def model_of(name, **changes):
    config = {"vocab_size": 61, "context_length": 24} | SHAPE | MODELS[name] | changes
    return make_model(ModelConfig(**config))


def texts(model, cache, settings, make):
    config = GenerationConfig(**{"temperature": 0, "max_new_tokens": 8, "cache": cache} | settings)
    decoder = make(model, config)
    for prompt in PROMPTS:
        for sample in range(config.num_samples):
            decoder.add(prompt, sample=sample)
    tokens = {}
    while decoder.busy:
        for token in decoder.advance():
            tokens.setdefault(token.sequence, []).append(token.id)
    return tokens


def speculator(guesses):
    def make(model, config):
        guesser = guesses(model, config)
        return Speculator(model, config, guesser, num_draft_tokens=3)

    return make


DECODERS = {
    "in batches of 2": lambda model, config: Decoder(model, config, batch_size=2),
    "chosen ahead": lambda model, config: Decoder(model, config, ahead=4),
    "looked up": speculator(lambda model, config: PromptLookup()),
    "drafted": speculator(lambda model, config: DraftModel(model, config, cache=config.cache)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("settings", "make"),
    [
        *[(settings, DECODERS["in batches of 2"]) for settings in list(SETTINGS.values())[:3]],
        (SETTINGS["with details"], DECODERS["in batches of 2"]),
        (SETTINGS["beams"], BeamSearch),
        *[({}, make) for make in list(DECODERS.values())[1:]],
    ],
    ids=["greedy", "drawn", "past the context", "details", "beams", *list(DECODERS)[1:]],
)
def test_texts_are_those_of_a_float_cache_with_rounded_rows(name, settings, make, monkeypatch):
    model, made, new_cache = model_of(name), [], GPT.new_cache

    def recorded(self, *args, **kwargs):
        made.append(new_cache(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(GPT, "new_cache", recorded)
    got = texts(model, "int8", settings, make)
    assert {cache.stored_as for cache in made} == {"int8"}
    monkeypatch.setattr(Store, "_stored", lambda self, k, v: (as_float(k), as_float(v)))
    monkeypatch.setattr(Copied, "_stored", lambda self, k, v: (k, v))
    assert got == texts(model, "float", settings, make)


def test_a_text_read_with_rounded_keys_and_values_costs_little():
    torch.manual_seed(0)
    model, tokenizer = model_of("grouped heads", vocab_size=257), ByteTokenizer()
    ids = tokenizer.encode("First Citizen: Before we proceed any further, hear me speak. " * 4)
    plain, rounded = (score_text(model, tokenizer, ids, cache=kind) for kind in ("float", "int8"))
    assert plain.counts.tolist() == rounded.counts.tolist()
    assert 0 < abs(rounded.loss - plain.loss) < 0.01 * plain.loss


def test_memory_that_lacks_room_for_float_may_have_room_for_int8(monkeypatch):
    model = prepare_for_inference(model_of("learned positions"), "bfloat16")
    asked = []
    monkeypatch.setattr(
        "gpt.generation.checks.check_memory", lambda what, size, device, advice: asked.append(size)
    )
    for kind in ("float", "int8"):
        check_cache(model, 1000, 24, kind)
    rows = 1000 * 24 * 2 * 4 * 2
    assert asked[0] - asked[1] == rows * (16 * model.cache_dtype.itemsize - (16 + 4))


def test_the_command_line_takes_the_format(monkeypatch):
    assert SampleConfig(cache="int8").cache == "int8"
    assert EvaluateConfig(models=("x",), text="y", cache="int8").cache == "int8"
    with pytest.raises(UsageError, match="cache is 'int8', and is measured on a text"):
        EvaluateConfig(models=("x",), lambada=Path("y"), cache="int8")
    with pytest.raises(UsageError, match="cache is 'int4', and must be one of float, int8"):
        GenerationConfig(cache="int4")


@pytest.mark.parametrize("name", MODELS)
def test_speculative_decodings_cache_grows_with_the_text(name, monkeypatch):
    model, sizes = model_of(name, context_length=2048), []
    append = KVCache.append

    def recorded(self, *args):
        sizes.append((self.length, self.capacity))
        return append(self, *args)

    monkeypatch.setattr("gpt.generation.speculative.FIRST", 8)
    settings = {"max_new_tokens": 60}
    expected = texts(model, "float", settings, DECODERS["in batches of 2"])
    monkeypatch.setattr(KVCache, "append", recorded)
    assert texts(model, "float", settings, DECODERS["looked up"]) == expected
    assert max(length for length, _ in sizes) > 60
    assert all(capacity <= 2 * (length + 20) for length, capacity in sizes)
