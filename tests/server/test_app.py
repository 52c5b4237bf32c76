"""The server as its clients see it: the openai client, plain HTTP, and other sites' pages."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import re
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import gpt
from gpt.config import ServeConfig
from gpt.evaluation.likelihood import Request as LikelihoodRequest
from gpt.evaluation.likelihood import likelihoods
from gpt.generation.chat import chat_prompt
from gpt.server import guard, requests
from gpt.server import http as http_server
from gpt.server.app import Server
from gpt.server.engine import Engine
from tests.generation.test_chat import HELLO, model_of
from tests.server.conftest import serving, until

openai = pytest.importorskip("openai", reason="needs the client openai")
KEY = "sk-only-a-test"
ENDLESS = {"prompt": "a", "max_tokens": 8000, "logit_bias": {"258": -100}}
"""A completion that no token ends."""


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def generated(model, prompt, **settings):
    options = {"max_new_tokens": 16, "temperature": 1.0, "past_context": "stop"}
    return gpt.generate(model, [prompt], **options | settings)


def test_a_completion_is_the_text_of_generate(client, model):
    made = client.completions.create(model="tiny", prompt="Hello", seed=5)
    [expected] = generated(model, "Hello", seed=5)
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == "length"
    assert made.usage.prompt_tokens == 5
    assert made.usage.completion_tokens == 16
    assert made.usage.total_tokens == 21


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_those_of_generate_by_their_index(client, model, stream):
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, seed=4, max_tokens=20, stream=stream
    )
    texts = ["", "", ""]
    for piece in made if stream else [made]:
        for choice in piece.choices:
            part = choice.delta if stream else choice.message
            texts[choice.index] += part.content or ""
    ids, ends = chat_prompt(model, HELLO)
    expected = generated(model, ids, num_samples=3, seed=4, max_new_tokens=20)
    tokens = [itertools.takewhile(lambda i: i not in ends, each.tokens) for each in expected]
    wanted = [model[1].decode_bytes(list(part)).decode(errors="replace") for part in tokens]
    assert texts == wanted
    assert len(set(texts)) > 1


def test_a_stop_text_across_tokens_is_never_streamed_in_part(client, model):
    [whole] = generated(model, "Hello", seed=5, max_new_tokens=40)
    at = next(i for i in range(5, 35) if whole.text.find(whole.text[i : i + 3]) == i)
    stop = whole.text[at : at + 3]
    pieces = client.completions.create(
        model="tiny", prompt="Hello", seed=5, max_tokens=40, stop=stop, stream=True
    )
    choices = [piece.choices[0] for piece in pieces]
    assert "".join(choice.text for choice in choices) == whole.text[:at]
    assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize(("seed", "same"), [(-1, 2**63 - 1), (1 - 2**63, 1)])
def test_a_negative_seed_is_one_of_64_bits(client, model, seed, same):
    made = client.completions.create(model="tiny", prompt="Hello", seed=seed)
    assert made.choices[0].text == generated(model, "Hello", seed=same)[0].text


def test_a_temperature_of_nearly_0_is_the_likeliest_text(client, model):
    made = client.completions.create(model="tiny", prompt="Hello", temperature=1e-7)
    assert made.choices[0].text == generated(model, "Hello", temperature=0)[0].text


def test_an_answer_that_would_be_too_large_is_refused(client, monkeypatch):
    monkeypatch.setattr(requests, "MOST_LOGPROBS", 128 * 21 * 100)
    with pytest.raises(openai.BadRequestError, match="lower n, max_tokens or the number of"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, n=128, logprobs=True, top_logprobs=20, max_tokens=101
        )


def test_a_stream_is_the_same_text_in_pieces(client, model):
    pieces = list(
        client.completions.create(
            model="tiny", prompt="Hello", seed=5, stream=True,
            stream_options={"include_usage": True}, max_tokens=30,
        )
    )  # fmt: skip
    [expected] = generated(model, "Hello", seed=5, max_new_tokens=30)
    texts = [piece.choices[0].text for piece in pieces if piece.choices]
    assert "".join(texts) == expected.text
    assert len(texts) > 5
    assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].usage.completion_tokens == 30


def test_several_prompts_and_samples_come_in_order(client, model):
    made = client.completions.create(model="tiny", prompt=["A b", "C"], n=2, seed=1, max_tokens=8)
    expected = gpt.generate(
        model, ["A b", "C"], num_samples=2, seed=1, max_new_tokens=8, temperature=1.0
    )
    assert [choice.text for choice in made.choices] == [each.text for each in expected]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    ids = [model[1].encode(text).tolist() for text in ("A b", "C")]
    again = client.completions.create(model="tiny", prompt=ids, n=2, seed=1, max_tokens=8)
    assert [choice.text for choice in again.choices] == [each.text for each in expected]


def test_all_settings_reach_the_sampler(client, model):
    made = client.completions.create(
        model="tiny", prompt="Hello", seed=2, temperature=1.3, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={"101": 4, "102": -50}, stop=["e", "zz"], max_tokens=50,
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 2},
    )  # fmt: skip
    [expected] = generated(
        model, "Hello", seed=2, temperature=1.3, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=-0.5, bias={101: 4.0, 102: -50.0}, stop=("e", "zz"), max_new_tokens=50,
        top_k=40, min_p=0.01, repetition_penalty=1.2, min_new_tokens=2,
    )  # fmt: skip
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == ("stop" if expected.reason == "stop" else "length")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion_are_those_of_generate(client, model, stream):
    asked = {"model": "tiny", "prompt": "Hello", "seed": 3, "logprobs": 2, "max_tokens": 10}
    [expected] = generated(model, "Hello", seed=3, logprobs=2, max_new_tokens=10)
    made = client.completions.create(**asked, stream=stream)
    parts = [piece.choices[0].logprobs for piece in (made if stream else [made])]
    numbers = [number for part in parts for number in part.token_logprobs]
    assert numbers == pytest.approx(expected.logprobs, abs=1e-5)
    tops = [top for part in parts for top in part.top_logprobs]
    for top, own, likeliest in zip(tops, numbers, expected.top, strict=True):
        assert max(top.values()) == pytest.approx(likeliest[0][1], abs=1e-5)
        assert own in top.values()
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets == sorted(offsets)


def test_an_echo_has_the_logprobs_of_the_prompt(client, model):
    made = client.completions.create(
        model="tiny", prompt="Hello", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    [expected] = generated(model, "Hello", logprobs=1, max_new_tokens=1, temperature=0)
    told = made.choices[0].logprobs
    assert told.tokens[:5] == list("Hello")
    assert told.token_logprobs[0] is None
    own = [each.logprob for each in expected.prompt_details]
    assert told.token_logprobs[1:] == pytest.approx([*own, *expected.logprobs], abs=1e-5)
    assert made.choices[0].text == "Hello" + expected.text
    again = client.completions.create(
        model="tiny", prompt="Hello", echo=True, logprobs=1, max_tokens=0
    )
    assert again.choices[0].text == "Hello"
    assert again.choices[0].logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-5)
    assert again.usage.completion_tokens == 0


def test_scores_by_echo_are_those_of_the_adapter_for_the_harness(client, model):
    """As ``local-completions`` of lm-evaluation-harness asks for them."""
    pairs = [("To be, or", " not to be"), ("A", "B"), ("Once upon a ", "time")]
    encoded = [tuple(model[1].encode(text).tolist() for text in pair) for pair in pairs]
    scores = likelihoods(model[0], [LikelihoodRequest(*pair) for pair in encoded])
    made = client.completions.create(
        model="tiny", prompt=[context + rest for context, rest in encoded], max_tokens=1,
        temperature=0, logprobs=1, echo=True, seed=1234,
    )  # fmt: skip
    for choice, (context, _), score in zip(made.choices, encoded, scores, strict=True):
        part = slice(len(context), -1)
        numbers, tops = choice.logprobs.token_logprobs[part], choice.logprobs.top_logprobs[part]
        assert sum(numbers) == pytest.approx(score.total, abs=1e-4)
        greedy = all(own == max(top.values()) for own, top in zip(numbers, tops, strict=True))
        assert greedy == score.is_greedy


def answer_of(model, messages, **settings):
    return gpt.chat(model, messages, temperature=1.0, max_new_tokens=20, **settings)


def test_an_answer_is_that_of_chat(client, model):
    made = client.chat.completions.create(model="tiny", messages=HELLO, seed=4, max_tokens=20)
    assert made.choices[0].message.content == answer_of(model, HELLO, seed=4)
    assert made.choices[0].message.role == "assistant"
    assert made.object == "chat.completion"


def test_a_streamed_answer_is_that_of_chat(client, model):
    pieces = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=4, max_completion_tokens=20, stream=True
    )
    deltas = [piece.choices[0].delta for piece in pieces]
    assert deltas[0].role == "assistant"
    text = "".join(delta.content or "" for delta in deltas)
    assert text == answer_of(model, HELLO, seed=4)


def test_parts_of_a_message_are_joined_and_a_developer_is_the_system(client, model):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    told = [{"role": "system", "content": "Be kind."}, *HELLO]
    made = client.chat.completions.create(model="tiny", messages=asked, seed=4, max_tokens=20)
    assert made.choices[0].message.content == answer_of(model, told, seed=4)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_an_answer_come_with_bytes_and_alternatives(client, stream):
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=4, max_tokens=6, logprobs=True, top_logprobs=3,
        stream=stream,
    )  # fmt: skip
    parts = [piece.choices[0].logprobs for piece in (made if stream else [made])]
    tokens = [token for part in parts if part for token in part.content]
    assert 1 <= len(tokens) <= 6
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= token.top_logprobs[0].logprob <= 0
        assert len(token.bytes) == 1 or token.token.startswith("<|")
        text = bytes(token.bytes).decode(errors="replace")
        assert token.token == (f"bytes:\\x{token.bytes[0]:02x}" if text == "\ufffd" else text)


def test_a_second_turn_says_what_it_did_not_read_again(client):
    first = client.chat.completions.create(model="tiny", messages=HELLO, seed=4, max_tokens=20)
    turn = {"role": "assistant", "content": first.choices[0].message.content}
    messages = [*HELLO, turn, {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens


@pytest.mark.parametrize(("begun", "begins"), [([], True), ([72, 105], False)])
def test_an_answer_that_was_begun_keeps_the_space_of_its_next_token(model, begun, begins):
    body = {"messages": HELLO, "answer_token_ids": begun}
    asked = requests.chat(model, body, requests.Limits("tiny", 256))

    async def job():
        server = Server(Engine(model), model, ServeConfig(model="tiny"), 256)
        return server._job(asked, asyncio.Queue())

    assert asyncio.run(job()).begins is begins


def test_the_model_is_listed(client):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="other", prompt="a")


def test_many_clients_at_once_get_the_texts_that_they_get_alone(client, model):
    def text(seed):
        made = client.completions.create(model="tiny", prompt="Hello", seed=seed, max_tokens=12)
        return made.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(text, range(33)))
    expected = [generated(model, "Hello", seed=n, max_new_tokens=12)[0].text for n in range(33)]
    assert texts == expected


def post(address, content, path="/v1/completions", **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(
        address + path, content=body, headers={"Content-Type": "application/json", **names}
    )


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the request is not JSON"),
        (b"\xff", 400, "not UTF-8 at byte 0"),
        (b"[" * 100_000, 400, "nested too deeply"),
        ({"prompt": "a", "metadata": None, "n": 0}, 400, "n is 0, and must be at least 1"),
        ([], 400, "the request is [], and must be an object"),
        ({"prompt": "a" * 300}, 400, "the prompt has 300 tokens"),
        ({"prompt": [1, 999]}, 400, "the prompt has the token id 999"),
        ({"prompt": []}, 400, "prompt is [], and must be a text, a list of token ids"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, 400, "logit_bias has the token id 9999"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"prompt": ["a"] * 129}, 400, "may have 128 completions"),
        ({"prompt": "a" * 5000}, 413, "more than 4,000 bytes"),
        ({"prompt": "a" * 50_000}, 413, "more than 4,000 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_gets_an_error_object_with_one_sentence(model, body, status, says):
    with serving(model, config=ServeConfig(model="tiny", max_body=4000)) as (address, engine):
        if status == 413 or (isinstance(body, bytes) and len(body) > 4000):
            body = body if isinstance(body, dict) else body[:4000]
        answer = post(address, body)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert says in error["message"]
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"
        assert engine.metrics.failures == 0


def test_a_form_is_not_read(address):
    answer = post(address, b'{"prompt": "a"}', Content_Type="text/plain")
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/static/page.js", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_no_other_path_leads_anywhere(address, method, path, status):
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port)
    connection.request(method, path)  # as it is, not shortened by the client
    answer = connection.getresponse()
    assert answer.status == status
    assert "error" in json.loads(answer.read())
    connection.close()


def test_a_template_in_a_message_or_prompt_is_text(client, model):
    text = "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}"
    told = [{"role": "user", "content": text}]
    made = client.chat.completions.create(model="tiny", messages=told, seed=1, max_tokens=20)
    assert made.choices[0].message.content == answer_of(model, told, seed=1)
    echoed = client.completions.create(model="tiny", prompt=text, echo=True, max_tokens=1)
    assert echoed.choices[0].text.startswith(text)


def test_an_error_names_the_field_that_the_client_sent(address):
    error = post(address, {"prompt": "a", "logit_bias": {"9999": 1}}).json()["error"]
    assert error["param"] == "logit_bias"
    assert error["message"].startswith("logit_bias has the token id 9999")


def test_a_client_that_leaves_ends_its_sequence(model):
    with serving(model_of(context=8192)) as (address, engine):
        for body in ({"stream": True}, {}):
            place = urlsplit(address)
            connection = http.client.HTTPConnection(place.hostname, place.port)
            asked = {**ENDLESS, **body}
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(asked), kind)
            until(lambda: engine.running == 1)
            connection.close()
            if connection.sock is not None:
                connection.sock.close()
            until(lambda: engine.running == 0)
        assert engine.metrics.generated_tokens < 16000


def test_a_full_server_answers_429_and_says_when_to_come_back(model):
    with serving(model_of(context=8192), batch_size=1, queue=0) as (address, engine):
        body = {**ENDLESS, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as running:
            lines = running.iter_lines()  # an iterator that nobody holds closes the stream
            next(lines)
            refused = post(address, {"prompt": "b"})
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        until(lambda: engine.running == 0)
        assert post(address, {"prompt": "b"}).status_code == 200


def test_an_answer_that_takes_too_long_is_ended(model):
    config = ServeConfig(model="tiny", max_seconds=1e-6)
    with serving(model, config=config) as (address, _):
        answer = post(address, {"prompt": "a"})
        assert answer.status_code == 504
        streamed = post(address, {"prompt": "a", "stream": True})
        assert "took more than 1e-06 s" in streamed.text
        assert "[DONE]" not in streamed.text


def test_with_a_key_only_its_owners_are_answered(model):
    config = ServeConfig(model="tiny", api_key=KEY, host="0.0.0.0")
    with serving(model, config=config) as (address, _):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                answer = httpx.get(address + path, headers=headers)
                assert answer.status_code == 401
                assert KEY not in answer.text
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        headers = {"Authorization": f"bearer {KEY}", "Host": "models.example.com"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:9000"}, 403),
        ({"Origin": "https://good.example"}, 200),
    ],
    ids=str,
)
def test_other_sites_pages_neither_ask_nor_read(model, headers, status):
    config = ServeConfig(model="tiny", allow_origin=("https://good.example",))
    with serving(model, config=config) as (address, _):
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert answer.status_code == status
        allowed = answer.headers.get("Access-Control-Allow-Origin")
        good = headers.get("Origin") == "https://good.example"
        assert allowed == ("https://good.example" if good else None)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if not good:
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_a_browser_asks_first_and_only_allowed_pages_may_go_on(model):
    config = ServeConfig(model="tiny", allow_origin=("https://good.example",), api_key=KEY)
    with serving(model, config=config) as (address, _):
        for origin, status in (("https://good.example", 204), ("https://evil.example", 403)):
            answer = httpx.options(f"{address}/v1/completions", headers={"Origin": origin})
            assert answer.status_code == status
            assert ("Access-Control-Allow-Headers" in answer.headers) == (status == 204)
            assert ("Access-Control-Allow-Origin" in answer.headers) == (status == 204)


def test_an_allowed_page_may_send_the_headers_that_its_client_has(model):
    config = ServeConfig(model="tiny", allow_origin=("app://obsidian.md",))
    asked = {"Origin": "app://obsidian.md", "Access-Control-Request-Headers": "x-stainless-lang"}
    with serving(model, config=config) as (address, _):
        answer = httpx.options(f"{address}/v1/completions", headers=asked)
        assert answer.headers["Access-Control-Allow-Headers"] == "x-stainless-lang"


def silent_client(address, body):
    """A connection that asks and reads nothing."""
    place, content = urlsplit(address), json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((place.hostname, place.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


WORDY = {**ENDLESS, "stream": True, "logprobs": 20, "n": 4}


def test_a_client_that_reads_nothing_ends_its_sequences(monkeypatch):
    monkeypatch.setattr(guard, "SEND_SECONDS", 0.2)
    with serving(model_of(context=8192)) as (address, engine):
        with contextlib.closing(silent_client(address, WORDY)):
            until(lambda: engine.running == 4)
            until(lambda: engine.running == 0, seconds=60)
            assert engine.metrics.generated_tokens < 4 * 8000
        assert post(address, {"prompt": "b"}).status_code == 200


def test_the_server_ends_though_a_client_reads_nothing(monkeypatch):
    monkeypatch.setattr(http_server, "LAST_SECONDS", 0.2)
    big = {**WORDY, "max_tokens": 600, "n": 16}
    model = model_of(context=1024)
    with contextlib.ExitStack() as after, serving(model, batch_size=16) as (address, engine):
        after.enter_context(contextlib.closing(silent_client(address, big)))  # ends after it
        until(lambda: engine.running == 16)
        until(lambda: engine.running == 0, seconds=60)


class Transport:
    """That of a connection which was closed, or not, and whose client reads nothing."""

    def __init__(self, closing):
        self.transport, self.closing, self.aborted = self, closing, False

    def is_closing(self):
        return self.closing

    def abort(self):
        self.aborted = True


def test_a_connection_that_is_closed_and_not_read_is_ended(model, monkeypatch):
    server = http_server.server(None, Engine(model))
    closed, open_one = Transport(True), Transport(False)
    server.server_state.connections |= {closed, open_one}
    asyncio.run(server.on_tick(1))
    assert not closed.aborted
    monkeypatch.setattr(http_server, "LAST_SECONDS", -1.0)
    asyncio.run(server.on_tick(2))
    assert closed.aborted
    assert not open_one.aborted


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 21, 45])
def test_a_large_body_is_sent_in_parts(size, monkeypatch):
    monkeypatch.setattr(guard, "PART", 10)
    body = bytes(range(size))
    parts = list(guard._parts({"type": "http.response.body", "body": body}))
    assert b"".join(part["body"] for part in parts) == body
    assert all(len(part["body"]) <= 10 for part in parts)
    assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]


def test_the_metrics_are_read_while_the_model_runs():
    with serving(model_of(context=8192), prefix_bytes=1 << 20) as (address, engine):
        body = {**ENDLESS, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body):
            for number in range(200):
                assert httpx.get(f"{address}/metrics").status_code == 200
                if number % 10 == 0:
                    post(address, {"prompt": f"{number} " * 10, "max_tokens": 1})
        until(lambda: engine.running == 0)


def test_the_metrics_count_what_was_done(model):
    with serving(model) as (address, _):
        post(address, {"prompt": "Hello", "max_tokens": 3})
        post(address, b"{")
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        assert "gpt_prompt_tokens_total 5" in lines
        assert "gpt_generated_tokens_total 3" in lines
        assert 'gpt_requests_total{path="/v1/completions",status="200"} 1' in lines
        assert 'gpt_requests_total{path="/v1/completions",status="400"} 1' in lines
        assert 'gpt_time_to_first_token_seconds_bucket{le="+Inf"} 1' in lines
        assert "gpt_running_sequences 0" in lines
        for line in lines:
            assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2


def test_the_server_that_ends_finishes_what_runs(model):
    texts = []
    with serving(model_of(context=8192)) as (address, engine):
        asked = {**ENDLESS, "max_tokens": 400}
        thread = threading.Thread(target=lambda: texts.append(post(address, asked)))
        thread.start()
        until(lambda: engine.running == 1)
    thread.join()
    assert texts[0].json()["usage"]["completion_tokens"] == 400


def test_a_failure_of_the_model_is_an_error_object(model, monkeypatch):
    with serving(model) as (address, engine):
        with monkeypatch.context() as patched:
            patched.setattr(model[0], "features", lambda *args, **options: 1 / 0)
            answer = post(address, {"prompt": "Hello"})
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "server_error"
        assert engine.metrics.failures == 1
        assert post(address, {"prompt": "Hello"}).status_code == 200


def test_the_description_names_every_path(address):
    described = httpx.get(f"{address}/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(described["paths"])


def test_the_python_of_the_page_runs(address, capsys):
    page = (Path(gpt.__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block.replace("http://127.0.0.1:8000", address), {})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_no_request_that_fits_the_description_or_not_makes_the_server_fail(address):
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for operation in schema.get_all_operations():
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.ok().method == "post":  # nothing of the others can be wrong
            modes += [schemathesis.GenerationMode.NEGATIVE]
        for mode in modes:

            @hypothesis.settings(
                max_examples=200, deadline=None, database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            @hypothesis.given(operation.ok().as_strategy(generation_mode=mode))
            def check(case):
                assert case.call(base_url=address).status_code < 500

            check()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
def test_under_load_no_text_is_wrong_no_sequence_stays_and_the_memory_does_not_grow():
    from tests.soak.load import run

    assert run(seconds=20, clients=40) == 0
