import dataclasses

import pytest
import torch

from gpt.config import ModelConfig, UsageError
from gpt.generation.decode import decode
from tests.conftest import make_model
from tests.model.test_gpt import with_hugging_face_weights

CONTEXT = 16


def greedy(logits):
    return logits.argmax(-1)


@pytest.fixture
def tiny_model(tiny_config):
    """A model whose likeliest tokens vary: with tied embeddings it would repeat its last one."""
    model = make_model(dataclasses.replace(tiny_config, tie_embeddings=False))
    with torch.no_grad():
        model.position.weight.mul_(10)
        model.norm.bias.zero_()
    return model


def test_what_is_decoded_varies(tiny_model):
    tokens = torch.cat(list(decode(tiny_model, prompt_of(5), max_new_tokens=40, choose=greedy)))
    assert len(tokens.unique()) > 8


def prompt_of(length, batch_size=1):
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def without_a_cache(model, prompt, n, *, slide):
    """Greedy decoding by the definition: the full forward over what the model sees, each time."""
    seen, out = prompt[:, -CONTEXT:], []
    for _ in range(n):
        token = greedy(model(seen)[:, -1])
        out.append(token)
        seen = torch.cat([seen, token[:, None]], 1)
        if seen.shape[1] > CONTEXT:
            if not slide:
                break
            seen = seen[:, -(CONTEXT // 2) :]
    return torch.stack(out, 1)


@pytest.mark.parametrize("policy", ["stop", "slide"])
@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1, CONTEXT])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoding_with_the_cache_is_decoding_without_it(policy, length, batch_size, tiny_model):
    prompt = prompt_of(length, batch_size)
    tokens = decode(tiny_model, prompt, max_new_tokens=40, choose=greedy, past_context=policy)
    expected = without_a_cache(tiny_model, prompt, 40, slide=policy == "slide")
    assert torch.equal(torch.stack(list(tokens), 1), expected)


def test_greedy_decoding_is_hugging_faces():
    config = ModelConfig(
        vocab_size=97, context_length=48, n_layer=2, n_head=4, n_embd=32, tie_embeddings=False
    )
    ours, theirs = with_hugging_face_weights(config)
    prompt = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens = torch.stack(list(decode(ours, prompt, max_new_tokens=30, choose=greedy)), 1)
    assert len(expected[:, 7:].unique()) > 8
    assert torch.equal(tokens, expected[:, 7:])


def test_stop_ends_when_the_context_is_full(tiny_model):
    tokens = decode(
        tiny_model, prompt_of(10), max_new_tokens=100, choose=greedy, past_context="stop"
    )
    assert len(list(tokens)) == CONTEXT - 10 + 1  # the last one is predicted from a full context


def test_stop_refuses_a_prompt_longer_than_the_context(tiny_model):
    tokens = decode(tiny_model, prompt_of(17), max_new_tokens=1, choose=greedy, past_context="stop")
    with pytest.raises(UsageError, match="prompt has 17 tokens, and .* context_length is 16"):
        next(tokens)


def test_slide_takes_the_end_of_a_prompt_longer_than_the_context(tiny_model):
    prompt = prompt_of(30)
    long = decode(tiny_model, prompt, max_new_tokens=20, choose=greedy)
    short = decode(tiny_model, prompt[:, -CONTEXT:], max_new_tokens=20, choose=greedy)
    assert torch.equal(torch.stack(list(long)), torch.stack(list(short)))


def test_slide_works_in_a_context_of_one_token():
    model = make_model(ModelConfig(vocab_size=9, context_length=1, n_layer=1, n_head=1, n_embd=8))
    tokens = decode(model, torch.tensor([[3]]), max_new_tokens=5, choose=greedy)
    assert len(list(tokens)) == 5


def test_each_token_goes_through_the_model_once(tiny_model, monkeypatch):
    lengths = []
    forward = type(tiny_model).forward

    def counted(self, tokens, **kwargs):
        lengths.append(tuple(tokens.shape))
        return forward(self, tokens, **kwargs)

    monkeypatch.setattr(type(tiny_model), "forward", counted)
    list(decode(tiny_model, prompt_of(6), max_new_tokens=5, choose=greedy))
    assert lengths == [(1, 6), (1, 1), (1, 1), (1, 1), (1, 1)]
    lengths.clear()
    list(decode(tiny_model, prompt_of(6), max_new_tokens=3, choose=greedy, num_samples=4))
    assert lengths == [(1, 6), (4, 1), (4, 1)]  # one prefill for all samples
    lengths.clear()
    list(decode(tiny_model, prompt_of(CONTEXT), max_new_tokens=11, choose=greedy))
    half = CONTEXT // 2  # the cost of sliding: one prefill of half the context for each half of it
    assert lengths == [(1, CONTEXT), (1, half), *[(1, 1)] * half, (1, half)]


def test_samples_continue_each_prompt_side_by_side(tiny_model):
    prompts = prompt_of(6, batch_size=2)
    rows = decode(tiny_model, prompts, max_new_tokens=8, choose=greedy, num_samples=3)
    alone = [
        torch.cat(list(decode(tiny_model, p[None], max_new_tokens=8, choose=greedy)))
        for p in prompts
    ]
    expected = torch.stack([alone[0]] * 3 + [alone[1]] * 3)
    assert torch.equal(torch.stack(list(rows), 1), expected)


def test_no_gradient_is_kept(tiny_model):
    seen = []

    def watch(logits):
        seen.append(logits.requires_grad)
        return greedy(logits)

    list(decode(tiny_model, prompt_of(3), max_new_tokens=3, choose=watch))
    assert seen == [False] * 3


def test_dropout_is_off_while_decoding_and_the_models_mode_is_left_as_it_was(tiny_config):
    config = dataclasses.replace(tiny_config, dropout=0.5, tie_embeddings=False)
    model = make_model(config)
    expected = list(decode(model, prompt_of(5), max_new_tokens=10, choose=greedy))
    model.train()
    assert list(decode(model, prompt_of(5), max_new_tokens=10, choose=greedy)) == expected
    assert model.training
