"""The page at / and what it asks the server."""

import httpx
import pytest
import torch

from gpt.config import ModelConfig, ServeConfig
from gpt.generation.attention_weights import attention_of_last
from gpt.generation.inference import prepare_for_inference
from gpt.model.gpt import GPT
from gpt.server.page import FOLDER, PAGES
from tests.server.conftest import serving

MESSAGES = [{"role": "user", "content": "hi"}]


def test_the_page_is_served_and_loads_nothing_from_elsewhere(address):
    for path, (name, kind) in PAGES.items():
        answer = httpx.get(address + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.content == (FOLDER / name).read_bytes()
        assert b"https://" not in answer.content
        assert b"innerHTML" not in answer.content  # a model's text is never markup
    assert {name for name, _ in PAGES.values()} == {path.name for path in FOLDER.iterdir()}


def test_the_page_needs_no_key_and_what_it_asks_does(model):
    config = ServeConfig(model="tiny", port=0, api_key="secret")
    with serving(model, config=config) as (address, _):
        assert httpx.get(address).status_code == 200
        body = {"token_ids": [1, 2]}
        assert httpx.post(f"{address}/v1/attention", json=body).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{address}/v1/attention", json=body, headers=key).status_code == 200


def test_an_answer_has_the_ids_of_all_tokens_if_asked(address):
    body = {"prompt": "abc", "max_tokens": 5, "logprobs": 3, "seed": 1, "return_token_ids": True}
    [choice] = httpx.post(f"{address}/v1/completions", json=body).json()["choices"]
    assert bytes(b for token in choice["prompt_tokens"] for b in token["bytes"]) == b"abc"
    assert len(choice["tokens"]) == 5
    for token, logprob in zip(choice["tokens"], choice["logprobs"]["token_logprobs"], strict=True):
        assert token["logprob"] == logprob
        assert len(token["top"]) == 3
        assert token["top"][0]["logprob"] >= token["top"][1]["logprob"]
    del body["return_token_ids"]
    [choice] = httpx.post(f"{address}/v1/completions", json=body).json()["choices"]
    assert not {"tokens", "prompt_tokens"} & set(choice)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_fork_goes_on_as_the_text_did(address, path):
    """An answer that begins with the first tokens of a greedy one is the rest of that one."""
    asked = {"messages": MESSAGES} if "chat" in path else {"prompt": "abc"}
    asked |= {"temperature": 0, "return_token_ids": True, "max_tokens": 12}
    url = f"{address}/v1/{path}"
    [whole] = httpx.post(url, json=asked).json()["choices"]
    ids = [token["id"] for token in whole["tokens"]]
    if "chat" in path:
        asked["answer_token_ids"] = ids[:5]
    else:
        asked["prompt"] = [token["id"] for token in whole["prompt_tokens"]] + ids[:5]
    [rest] = httpx.post(url, json=asked | {"max_tokens": 7}).json()["choices"]
    assert [token["id"] for token in rest["tokens"]] == ids[5:]


VARIANTS = {
    "learned": {},
    "rotary, grouped queries": {"position": "rotary", "n_kv_head": 1},
    "alibi": {"position": "alibi"},
    "window": {"window": 3, "window_pattern": "GL"},
    "softcap, learned sinks": {"attention_softcap": 5.0, "learned_sinks": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_attention_is_that_of_the_model(variant):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=17, context_length=16, n_layer=2, n_head=2, n_embd=32, **VARIANTS[variant]
    )
    model = GPT(config).eval()
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    weights = attention_of_last(model, ids)
    assert weights.shape == (2, 2, 8)
    if "sinks" not in variant:
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2), atol=1e-5)
    if variant == "window":
        assert (weights[1, :, :5] == 0).all()
        assert (weights[0] > 0).all()
    # The layer's output is its values by these weights.
    attn, inputs = model.blocks[0].attn, []
    attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    outputs = []
    attn.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(torch.tensor([ids]))
    v = attn.qkv(inputs[0][0]).view(8, -1, 16)[:, -attn.n_kv_head :].transpose(0, 1)
    v = v.repeat_interleave(2 // attn.n_kv_head, dim=0)  # H, T, D
    mixed = torch.einsum("ht,htd->hd", weights[0], v).flatten()
    assert torch.allclose(attn.out(mixed), outputs[0][0, -1], atol=1e-5)


def test_attention_of_a_packed_model_is_about_that_of_the_model():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=17, context_length=16, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).eval()
    packed = prepare_for_inference(model, "int8")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    assert torch.allclose(attention_of_last(packed, ids), attention_of_last(model, ids), atol=0.02)


def test_attention_comes_while_others_are_continued(address, model):
    body = {"prompt": "abc", "max_tokens": 100, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as stream:
        events = stream.iter_lines()
        next(events)
        answer = httpx.post(f"{address}/v1/attention", json={"token_ids": [5, 6, 7]}).json()
        assert sum(1 for line in events if line.startswith("data:")) > 2
    expected = attention_of_last(model[0], [5, 6, 7])
    assert torch.allclose(torch.tensor(answer["weights"]), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "token_ids is missing"),
        ({"token_ids": [1] * 300}, "attention is shown for up to 256"),
        ({"token_ids": [10**6]}, "token"),
    ],
)
def test_attention_of_what_is_no_text_is_refused(address, body, said):
    answer = httpx.post(f"{address}/v1/attention", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_server_may_store_its_cache_in_8_bits(model):
    with serving(model, cache="int8") as (address, engine):
        body = {"prompt": "abc" * 20, "max_tokens": 5, "temperature": 0}
        first = httpx.post(f"{address}/v1/completions", json=body).json()["choices"][0]["text"]
        again = httpx.post(f"{address}/v1/completions", json=body).json()
        assert again["choices"][0]["text"] == first
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        eight = engine.prefixes.nbytes
    with serving(model) as (address, engine):
        httpx.post(f"{address}/v1/completions", json=body)
        assert eight < 0.7 * engine.prefixes.nbytes
