"""Texts of a model in training."""

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from gpt import kernels
from gpt.config import GenerationConfig, ModelConfig
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation import rollout
from gpt.generation.inference import InferenceGPT
from gpt.generation.inference import prepare_for_inference as prepare
from gpt.generation.rollout import FEW, can_share, sharing, write_texts, writer
from gpt.generation.text import generate
from gpt.training.activations import checkpoint_activations
from tests.conftest import make_model

CONFIGS = {
    "gpt2": {},
    "modern": {
        "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu",
        "n_kv_head": 2, "bias": False, "tie_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def model(request):
    config = {"vocab_size": 260, "context_length": 32, "n_layer": 2, "n_head": 4, "n_embd": 128}
    return make_model(ModelConfig(**config | CONFIGS[request.param]))


def settings(**fields):
    return GenerationConfig(**{"max_new_tokens": 8, "seed": 3, "past_context": "stop"} | fields)


def test_the_model_that_writes_has_the_tensors_of_the_one_that_learns(model):
    writer = sharing(model)
    assert isinstance(writer, InferenceGPT)
    own = {p.data_ptr() for p in model.parameters()}
    assert {t.data_ptr() for t in writer.own_tensors().values()} == own


def test_an_update_in_place_is_an_update_of_what_is_written(model):
    writer, tokens = sharing(model), torch.tensor([[5, 6, 7]])
    for _ in range(2):
        cache = writer.new_cache(1, capacity=8)
        with torch.inference_mode():
            found = writer.logits(writer.features(tokens, cache=cache))  # by the kernels
            wanted = model(tokens)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
    assert kernels.library() is None or writer.few > 0


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def fast(request, monkeypatch):
    """What the processor is said to multiply."""
    monkeypatch.setattr(rollout, "choose_precision", lambda *_: request.param)
    return request.param


def test_the_writer_has_the_dtype_that_the_processor_multiplies(model, fast):
    few, many = (writer(model, n, torch.bfloat16) for n in (FEW, FEW + 1))
    if fast == torch.float32:
        own = {p.data_ptr() for p in model.parameters()}
        assert {t.data_ptr() for t in few.own_tensors().values()} == own
        assert many is model
    else:
        assert [w.weights for w in (few, many)] == ["bfloat16", "bfloat16"]
    assert writer(model, FEW + 1, torch.float32) is model  # what is trained in float32 stays so


def test_each_call_writes_from_the_present_weights_and_leaves_no_copy(model, fast, monkeypatch):
    copies = []

    def watched(*arguments):
        copy = prepare(*arguments)
        copies.append(ref(copy))
        return copy

    monkeypatch.setattr(rollout, "prepare_for_inference", watched)
    tokenizer = ByteTokenizer()
    [before] = write_texts(model, tokenizer, [[1]], [0], settings(temperature=0), fast)
    gc.collect()
    assert [copy() for copy in copies] == [None]
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
    [after] = write_texts(model, tokenizer, [[1]], [0], settings(temperature=0), fast)
    assert after.tokens != before.tokens


def test_the_texts_are_those_of_generate(model, fast):
    tokenizer, prompts = ByteTokenizer(), ["ab", "cd", "ab"]
    ids = [list(prompt.encode()) for prompt in prompts]
    written = write_texts(model, tokenizer, ids, [0, 0, 1], settings(), fast)
    again = writer(model, 3, fast), tokenizer
    twice = generate(again, ["ab", "cd"], num_samples=2, **fields_of(settings()))
    assert [list(w.tokens) for w in written] == [twice[i].tokens for i in (0, 2, 1)]
    assert [w.text for w in written] == [twice[i].text for i in (0, 2, 1)]


def fields_of(config):
    return {name: getattr(config, name) for name in ("max_new_tokens", "seed", "past_context")}


def test_a_text_does_not_depend_on_the_others_of_its_batch(model):
    tokenizer = ByteTokenizer()
    many = write_texts(model, tokenizer, [[i, i + 1] for i in range(9)], range(9), settings())
    alone = write_texts(model, tokenizer, [[4, 5]], [4], settings())
    assert alone[0] == many[4]


def test_writing_changes_neither_the_mode_nor_the_random_state_nor_a_gradient(model):
    model.train()
    model(torch.tensor([[1, 2]])).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    before = torch.get_rng_state()
    write_texts(model, ByteTokenizer(), [[1]], [0], settings())
    assert model.training
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad for p in model.parameters())
    pairs = zip(gradients, model.parameters(), strict=True)
    assert all(torch.equal(gradient, p.grad) for gradient, p in pairs)


def test_a_model_that_the_kernels_cannot_read_writes_itself(model):
    assert can_share(model)

    class Adapted(nn.Linear):
        pass

    model.blocks[0].mlp.up.__class__ = Adapted
    assert sharing(model) is model
    model.blocks[0].mlp.up.__class__ = nn.Linear
    model.to(torch.bfloat16)
    assert sharing(model) is model
    model.to(torch.float32)
    checkpoint_activations(model, "full")
    assert sharing(model) is model
    [written] = write_texts(model, ByteTokenizer(), [[1]], [0], settings())
    assert len(written.tokens) == 8
