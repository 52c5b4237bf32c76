"""OpenAI's requests: their fields, and the settings and prompts that they stand for.

The fields that the server cannot fulfil are refused. Those in ``IGNORED`` change no answer here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt.config import GenerationConfig, UsageError, quoted
from gpt.config.generation import LEAST_TEMPERATURE
from gpt.data.tokenizer import Tokenizer
from gpt.generation.chat import chat_prompt
from gpt.generation.checks import check_prompt, check_settings
from gpt.generation.text import encode_prompt
from gpt.model.gpt import GPT
from gpt.server.schema import RequestError, Schema, check, one_of, record

MOST_SEQUENCES = 128
"""Completions of one request."""
MOST_TOP = 20
MOST_LOGPROBS = 2_000_000
"""Log-probabilities in one answer: some 200 MB of JSON."""
COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that does not say it (OpenAI's default)."""
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP: Schema = {
    "anyOf": [
        {"type": ["string", "null"], "minLength": 1, "maxLength": 1000},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 1000},
            "maxItems": 16,
        },
    ],
    "title": "a text or a list of up to 16 texts, each of 1 to 1,000 characters",
}
SHARED: dict[str, Schema] = {
    "model": one_of("string"),
    "max_tokens": one_of("integer", minimum=0),
    "n": one_of("integer", minimum=1, maximum=MOST_SEQUENCES),
    "stop": _STOP,
    "stream": one_of("boolean"),
    "stream_options": one_of(
        "object",
        properties={
            "include_usage": one_of("boolean"),
            "include_obfuscation": one_of("boolean"),
        },
        additionalProperties=False,
    ),
    "seed": one_of("integer", minimum=1 - 2**63),
    "temperature": one_of("number", minimum=0, maximum=2),
    "top_p": one_of("number", exclusiveMinimum=0, maximum=1),
    "presence_penalty": one_of("number", minimum=-2, maximum=2),
    "frequency_penalty": one_of("number", minimum=-2, maximum=2),
    "logit_bias": one_of(
        "object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100}
    ),
    "top_k": one_of("integer", minimum=0),
    "min_p": one_of("number", minimum=0, maximum=1),
    "repetition_penalty": one_of("number", minimum=0.1, maximum=10),
    "min_tokens": one_of("integer", minimum=0),
    "return_token_ids": one_of("boolean"),
}
"""The fields that both kinds of requests have; the last five are not OpenAI's."""
IGNORED: dict[str, Schema] = {
    name: {}
    for name in (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity",
    )
}  # fmt: skip
COMPLETION = record(
    {
        **SHARED,
        "prompt": {
            "anyOf": [
                {"type": ["string", "null"]},
                _IDS,
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _IDS, "minItems": 1},
            ],
            "title": "a text, a list of token ids, or a list of these",
        },
        "echo": one_of("boolean"),
        "logprobs": one_of("integer", minimum=0, maximum=MOST_TOP),
        "best_of": one_of("integer", minimum=1, maximum=MOST_SEQUENCES),
        "suffix": one_of("string", maxLength=0),
        **IGNORED,
    },
)
_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": _PART}],
            "title": "a text, or a list of parts of the type text",
        },
    },
    "required": ["role"],
}
CHAT = record(
    {
        **SHARED,
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "max_completion_tokens": one_of("integer", minimum=1),
        "max_tokens": one_of("integer", minimum=1),
        "logprobs": one_of("boolean"),
        "top_logprobs": one_of("integer", minimum=0, maximum=MOST_TOP),
        "response_format": one_of(
            "object", properties={"type": {"enum": ["text"]}}, required=["type"]
        ),
        "modalities": one_of("array", items={"enum": ["text"]}),
        "chat_template_kwargs": one_of("object"),
        "answer_token_ids": one_of("array", items={"type": "integer", "minimum": 0}),
        "tool_choice": one_of("string", enum=["none"]),
        "tools": one_of("array", maxItems=0),
        **IGNORED,
    },
    ("messages",),
)
ATTENTION = record({"token_ids": _IDS}, ("token_ids",))
MOST_ATTENTION = 2048
"""Tokens of a text whose attention is shown."""

RESERVED = {"chat", "messages", "name", "add_generation_prompt"}
"""Names that a chat template gets from the server."""


@dataclass(frozen=True)
class Request:
    """What the model is asked for."""

    prompts: list[list[int]]
    config: GenerationConfig
    ends: frozenset[int]
    texts: list[str]
    """Of a completion: the prompts' texts, for ``echo``."""
    is_chat: bool
    stream: bool
    include_usage: bool
    echo: bool = False
    only_prompt: bool = False
    """Whether ``max_tokens`` is 0: the model's one token is left out."""
    gives_ids: bool = False
    """Whether the answer has the ids of all tokens."""
    is_begun: bool = False
    """Whether the prompt has the beginning of the answer."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    name: str
    """What clients call the model."""
    length: int
    """Tokens of a prompt and its answer together."""


def completion(model: tuple[GPT, Tokenizer], body: Any, limits: Limits) -> Request:
    """The request in the ``body`` of ``/v1/completions``; :class:`RequestError` if it is wrong."""
    check(body, COMPLETION)
    given = _given(body, limits)
    prompt = given.get("prompt", "")
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    listed = prompt if several else [prompt]
    n = given.get("n", 1)
    if given.get("best_of", n) != n:
        raise RequestError("best_of is not supported, and must be n", param="best_of")
    if len(listed) * n > MOST_SEQUENCES:
        raise RequestError(
            f"the request has {len(listed)} prompts and n {n}, and may have {MOST_SEQUENCES} "
            "completions",
            param="n",
        )
    prompts = [_encoded(model[1], one) for one in listed]
    asked = given.get("max_tokens", COMPLETION_TOKENS)
    config = _config(model, given, prompts, limits, asked, given.get("logprobs"))
    echo = bool(given.get("echo"))
    texts = [
        one if isinstance(one, str) else model[1].decode_bytes(ids).decode(errors="replace")
        for one, ids in zip(listed, prompts, strict=True)
    ]
    gives_ids = bool(given.get("return_token_ids"))
    return Request(
        prompts, config, frozenset(), texts, False, *_streaming(given), echo, asked == 0, gives_ids
    )


def chat(model: tuple[GPT, Tokenizer], body: Any, limits: Limits) -> Request:
    """The request in the ``body`` of ``/v1/chat/completions``; :class:`RequestError` if it is
    wrong.
    """
    check(body, CHAT)
    given = _given(body, limits)
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = (top or 0) if given.get("logprobs") else None
    variables = given.get("chat_template_kwargs", {})
    if reserved := RESERVED.intersection(variables):
        raise RequestError(
            f"chat_template_kwargs has {min(reserved)}, which is not the caller's to set",
            param="chat_template_kwargs",
        )
    messages = [_message(message) for message in given["messages"]]
    try:
        ids, ends = chat_prompt(model, messages, variables=variables)
    except UsageError as error:
        raise RequestError(str(error), param="messages") from None
    begun = given.get("answer_token_ids")
    prompts = [[*ids, *_encoded(model[1], begun)] if begun else ids]
    asked = given.get("max_completion_tokens", given.get("max_tokens", limits.length))
    config = _config(model, given, prompts, limits, asked, logprobs)
    gives_ids = bool(given.get("return_token_ids"))
    streaming = _streaming(given)
    return Request(
        prompts, config, ends, [], True, *streaming, gives_ids=gives_ids, is_begun=bool(begun)
    )


def attention(model: tuple[GPT, Tokenizer], body: Any, limits: Limits) -> list[int]:
    """The text in the ``body`` of ``/v1/attention``; :class:`RequestError` if it is wrong."""
    check(body, ATTENTION)
    ids = _encoded(model[1], body["token_ids"])
    most = min(MOST_ATTENTION, limits.length)
    if len(ids) > most:
        raise RequestError(
            f"token_ids has {len(ids):,} tokens, and attention is shown for up to {most:,}",
            param="token_ids",
        )
    try:
        check_prompt(model[0], ids, GenerationConfig(past_context="stop"), model[1].vocab_size)
    except UsageError as error:
        raise RequestError(str(error), param="token_ids") from None
    return ids


def _given(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The fields that are not null."""
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("model", limits.name) != limits.name:
        raise RequestError(
            f"the model {quoted(given['model'])} does not exist; this server has {limits.name!r}",
            param="model",
            status=404,
            code="model_not_found",
        )
    return given


def _streaming(given: Mapping[str, Any]) -> tuple[bool, bool]:
    options = given.get("stream_options")
    if options is not None and not given.get("stream"):
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    return bool(given.get("stream")), bool((options or {}).get("include_usage"))


def _encoded(tokenizer: Tokenizer, prompt: Any) -> list[int]:
    try:
        return encode_prompt(tokenizer, prompt)
    except UsageError as error:
        raise RequestError(str(error), param="prompt") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates know it: its content is a text."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": "" if content is None else content}


def _config(
    model: tuple[GPT, Tokenizer],
    given: Mapping[str, Any],
    prompts: list[list[int]],
    limits: Limits,
    asked: int,
    logprobs: int | None,
) -> GenerationConfig:
    """The settings of the request, after a check of its prompts' lengths."""
    longest = max(map(len, prompts))
    if longest >= limits.length:
        raise RequestError(
            f"the prompt has {longest:,} tokens, and the model's context has {limits.length:,} for "
            "the prompt and its answer together; shorten the prompt",
            param="messages" if "messages" in given else "prompt",
            code="context_length_exceeded",
        )
    n, new = given.get("n", 1), max(1, min(asked, limits.length - longest))
    if logprobs is not None:
        each = n * (1 + logprobs)  # of a token
        echoed = each * sum(map(len, prompts)) if given.get("echo") else 0
        if not given.keys() & {"max_tokens", "max_completion_tokens"}:
            new = max(1, min(new, (MOST_LOGPROBS - echoed) // (each * len(prompts))))
        listed = echoed + each * len(prompts) * new
        if listed > MOST_LOGPROBS:
            raise RequestError(
                f"the answer may have {listed:,} log-probabilities, and at most "
                f"{MOST_LOGPROBS:,}: lower n, max_tokens or the number of log-probabilities",
                param="logprobs",
            )
    stop = given.get("stop", ())
    settings: dict[str, Any] = {
        name: given[name]
        for name in (
            "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p",
            "repetition_penalty", "seed",
        )
        if name in given
    }  # fmt: skip
    settings.setdefault("temperature", 1.0)
    if settings["temperature"] < LEAST_TEMPERATURE:
        settings["temperature"] = 0.0
    if "seed" in settings:
        settings["seed"] %= 2**63
    try:
        config = GenerationConfig(
            **settings,
            bias=_bias(given.get("logit_bias", {})),
            num_samples=n,
            max_new_tokens=new,
            min_new_tokens=given.get("min_tokens", 0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
            past_context="stop",
        )
        check_settings(model[0], config, model[1].vocab_size)
        for prompt in prompts:
            check_prompt(model[0], prompt, config, model[1].vocab_size)
    except UsageError as error:
        name, _, rest = str(error).partition(" ")
        name = "logit_bias" if name == "bias" else name
        raise RequestError(f"{name} {rest}", param=name if name in given else None) from None
    return config


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for key, number in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(
                f"logit_bias has {quoted(key)}, which is not a token id", param="logit_bias"
            )
        bias[int(key)] = float(number)
    return bias
