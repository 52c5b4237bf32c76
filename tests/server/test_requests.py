"""What a request may have in it, and the settings that it stands for."""

import json

import pytest

from gpt.generation.text import Completion
from gpt.server import requests
from gpt.server.engine import Job, Piece
from gpt.server.requests import CHAT, COMPLETION, Limits
from gpt.server.responses import Answer, TokenTexts
from gpt.server.schema import RequestError, check, one_of, record
from tests.generation.test_chat import HELLO, tokenizer_of

LIMITS = Limits("tiny", 200)
PARSERS = {"completion": requests.completion, "chat": requests.chat}
SMALLEST = {"completion": {"prompt": "Hi"}, "chat": {"messages": HELLO}}
WRONG = [
    ({"n": 129}, "n is 129, and must be at most 128"),
    ({"n": "1"}, "n is '1', and must be a whole number"),
    ({"n": True}, "n is True, and must be a whole number"),
    ({"temperature": 2.1}, "temperature is 2.1, and must be at most 2"),
    ({"temperature": float("nan")}, "temperature must be below 2**63"),
    ({"temperature": float("inf")}, "temperature must be below 2**63"),
    ({"top_p": 0}, "top_p is 0, and must be above 0"),
    ({"stop": ""}, "stop is '', and must be a text or a list"),
    ({"stop": ["a"] * 17}, "must be a text or a list of up to 16"),
    ({"logit_bias": {"a": 1}}, "logit_bias has 'a', which is not a token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1 is 101, and must be at most 100"),
    ({"seed": -(2**63)}, "seed must be below 2**63"),
    ({"seed": 2**80}, "seed must be below 2"),
    ({"presence_penalty": -3}, "presence_penalty is -3"),
    ({"steam": True}, "'steam' is not a known field; did you mean stream?"),
    ({"qqq": True}, "'qqq' is not a known field"),
    ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
    ({"model": "other"}, "the model 'other' does not exist; this server has 'tiny'"),
    ({"model": 1}, "model is 1, and must be a text"),
]


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(("changes", "says"), WRONG, ids=str)
def test_a_wrong_field_is_named_with_what_would_be_right(model, kind, changes, says):
    with pytest.raises(RequestError) as refused:
        PARSERS[kind](model, SMALLEST[kind] | changes, LIMITS)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": []}, "messages has 0 items, and must have at least 1 item"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of the type"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs to be true"),
        ({"logprobs": 3}, "logprobs is 3, and must be true or false"),
        ({"tools": [{}]}, "tools has 1 item, and must have at most 0 items"),
        ({"response_format": {"type": "json_object"}}, "response_format.type is 'json_object'"),
        ({"chat_template_kwargs": {"name": "x"}}, "chat_template_kwargs has name"),
        ({"chat_template_kwargs": {"chat": "x"}}, "chat_template_kwargs has chat"),
        ({"max_tokens": 0}, "max_tokens is 0, and must be at least 1"),
    ],
    ids=str,
)
def test_a_wrong_conversation_is_refused(model, changes, says):
    with pytest.raises(RequestError) as refused:
        requests.chat(model, {"messages": HELLO} | changes, LIMITS)
    assert says in str(refused.value)


@pytest.mark.parametrize("kind", PARSERS)
def test_null_stands_for_what_is_not_given_and_ignored_fields_change_nothing(model, kind):
    plain = PARSERS[kind](model, SMALLEST[kind], LIMITS)
    schema = COMPLETION if kind == "completion" else CHAT
    nothing = dict.fromkeys(set(schema["properties"]) - {"messages"})
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True}
    assert PARSERS[kind](model, nothing | SMALLEST[kind] | ignored, LIMITS) == plain
    assert plain.config.temperature == 1.0


def test_an_answer_ends_where_the_context_does(model):
    asked = requests.chat(model, {"messages": HELLO}, LIMITS)
    [prompt] = asked.prompts
    assert asked.config.max_new_tokens == 200 - len(prompt)
    with pytest.raises(RequestError, match="shorten the prompt") as refused:
        requests.completion(model, {"prompt": "a" * 200}, LIMITS)
    assert refused.value.code == "context_length_exceeded"


def test_without_a_template_a_conversation_is_refused(model):
    with pytest.raises(RequestError, match="no chat template"):
        requests.chat((model[0], tokenizer_of(template="")), {"messages": HELLO}, LIMITS)


def test_the_tables_are_json_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    for schema in (COMPLETION, CHAT):
        jsonschema.Draft202012Validator.check_schema(json.loads(json.dumps(schema)))


def test_the_check_knows_what_it_says():
    schema = record({"a": one_of("integer", minimum=1), "b": {"type": "string"}}, ("b",))
    check({"a": None, "b": ""}, schema)
    check({"b": "x", "a": 1}, schema)
    for value, says in (
        ({}, "b is missing"),
        ({"b": 1}, "b is 1, and must be a text"),
        ({"b": "", "a": 0}, "a is 0, and must be at least 1"),
        (3, "the request is 3, and must be an object"),
    ):
        with pytest.raises(RequestError, match=says):
            check(value, schema)


@pytest.mark.parametrize("kind", PARSERS)
def test_an_answer_is_whole_with_its_last_piece_although_the_model_is_ahead(model, kind):
    request = PARSERS[kind](model, SMALLEST[kind] | {"n": 2, "stream": True}, LIMITS)
    answer = Answer(request, Job(request.prompts, request.config, print), model[1], "tiny")
    done = [Completion(0, n, text="ab", tokens=[97, 98], reason="length") for n in range(2)]
    pieces = [Piece(each, "a", 1, False) for each in done]
    pieces += [Piece(each, "b", 2, True) for each in done]
    choices = []
    for piece in pieces:
        assert not answer.is_whole
        [choice] = json.loads(answer.chunk(piece).removeprefix("data: "))["choices"]
        choices.append((choice["index"], choice["finish_reason"]))
    assert answer.is_whole
    assert choices == [(0, None), (1, None), (0, "length"), (1, "length")]


def test_tokens_that_are_no_text_and_special_ones_have_names(model):
    names = TokenTexts(model[1])
    assert names.text(65) == "A"
    assert names.text(0xE2) == "bytes:\\xe2"
    assert names.text(256) == "<|im_start|>"
