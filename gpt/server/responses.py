"""OpenAI's responses: completions, conversations and their streams, as JSON values."""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from gpt.data.tokenizer import Tokenizer, special_tokens
from gpt.generation.context import Reason
from gpt.generation.logprobs import TokenDetails
from gpt.generation.text import Completion
from gpt.server.engine import Job, Piece
from gpt.server.requests import Request

FINISH: dict[Reason, str] = {
    "end_of_text": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
}
LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot express."""
Told = tuple[int, float, tuple[tuple[int, float], ...]]
"""A token, its log-probability, and the likeliest ids with theirs."""


class TokenTexts:
    """What clients call each token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i: text for text, i in special_tokens(tokenizer).items()}

    def content(self, token: int) -> bytes:
        """The token's bytes; of a special token those of its name."""
        content = self._tokenizer.decode_bytes([token])
        return content or self._special.get(token, "").encode()

    def is_special(self, token: int) -> bool:
        """Whether the token stands for no text."""
        return not self._tokenizer.decode_bytes([token])

    def text(self, token: int) -> str:
        r"""The token's text. Bytes that are no text by themselves are written ``bytes:\xe2``."""
        content = self.content(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Answer:
    """The responses to one request, whole or in pieces."""

    def __init__(self, request: Request, job: Job, tokenizer: Tokenizer, model: str) -> None:
        self.request, self.job = request, job
        self._tokenizer, self._names = tokenizer, TokenTexts(tokenizer)
        kind = "chatcmpl" if request.is_chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._head |= {"model": model}
        n = job.left
        self._told = [0] * n  # tokens of each choice
        self._offsets = [_Offsets(tokenizer) for _ in range(n)]
        self._completions: dict[int, Completion] = {}
        self._ended: set[int] = set()

    def index(self, completion: Completion) -> int:
        """The number of a completion among the choices."""
        return completion.prompt * self.request.config.num_samples + completion.sample

    def add(self, piece: Piece) -> None:
        """Count a piece. Its completion may be ahead of it: the model's thread goes on."""
        number = self.index(piece.completion)
        self._completions[number] = piece.completion
        if piece.ended:
            self._ended.add(number)

    @property
    def is_whole(self) -> bool:
        """Whether every completion has ended."""
        return len(self._ended) == len(self._told)

    def usage(self) -> dict[str, Any]:
        """The counts of tokens so far."""
        prompt = sum(map(len, self.job.prompts))
        made = sum(len(each.tokens) for each in self._completions.values())
        made = 0 if self.request.only_prompt else made
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": self.job.cached_tokens},
        }

    def whole(self) -> dict[str, Any]:
        """The response with every choice."""
        request, choices = self.request, []
        for number, each in sorted(self._completions.items()):
            text = "" if request.only_prompt else each.text
            choice: dict[str, Any] = {"index": number, "logprobs": self._logprobs(each)}
            choice["finish_reason"] = FINISH[each.reason or "length"]
            if request.is_chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = self._echoed(each) + text
            choices.append(choice | self._ids(each))
        kind = "chat.completion" if request.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def openings(self) -> list[str]:
        """What a stream of a conversation begins with: the role of each answer."""
        if not self.request.is_chat:
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            self._chunk({"index": number, "delta": delta, "logprobs": None, "finish_reason": None})
            for number in range(len(self._told))
        ]

    def chunk(self, piece: Piece) -> str:
        """The event of one piece."""
        self.add(piece)
        request, each = self.request, piece.completion
        number = self.index(each)
        text = "" if request.only_prompt else piece.text
        choice: dict[str, Any] = {
            "index": number,
            "logprobs": self._logprobs(each, piece.tokens),
            "finish_reason": FINISH[each.reason or "length"] if piece.ended else None,
        }
        if request.is_chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = (self._echoed(each) if self._told[number] == 0 else "") + text
        choice |= self._ids(each, piece.tokens)
        self._told[number] = piece.tokens
        return self._chunk(choice)

    def closing(self) -> str:
        """The event with the counts of tokens, the last one."""
        return self._event({"choices": [], "usage": self.usage()})

    def _chunk(self, choice: dict[str, Any]) -> str:
        content: dict[str, Any] = {"choices": [choice]}
        return self._event(content | ({"usage": None} if self.request.include_usage else {}))

    def _event(self, content: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        return event({**self._head, "object": kind, **content})

    def _echoed(self, each: Completion) -> str:
        return self.request.texts[each.prompt] if self.request.echo else ""

    def _logprobs(self, each: Completion, end: int | None = None) -> dict[str, Any] | None:
        """Those of a completion's tokens that were not told before, up to token ``end``."""
        request, number = self.request, self.index(each)
        if request.config.logprobs is None:
            return None
        start, told = self._told[number], []
        prompt: list[int] = []
        if request.echo and start == 0:
            prompt = self.job.prompts[each.prompt]
            details = self.job.prompt_details.get(each.prompt, [])
            told = _of_prompt(prompt, details)
        if not request.only_prompt:
            part = slice(start, end)
            told += zip(each.tokens[part], each.logprobs[part], each.top[part], strict=True)
        if request.is_chat:
            return {"content": [self._described(*one) for one in told], "refusal": None}
        return self._listed(told, self._offsets[number], has_first=bool(prompt))

    def _ids(self, each: Completion, end: int | None = None) -> dict[str, Any]:
        """The ids of a completion's tokens that were not told before, up to token ``end``, with
        bytes and, if asked for, the likeliest others; at the beginning also those of its prompt.
        """
        if not self.request.gives_ids:
            return {}
        start, has_logprobs = self._told[self.index(each)], self.request.config.logprobs is not None
        prompt: dict[str, Any] = {}
        if start == 0:
            prompt = {"prompt_tokens": [self._token(i) for i in self.job.prompts[each.prompt]]}
        tokens = []
        for number, token in enumerate(each.tokens[start:end], start):
            one = self._token(token)
            if has_logprobs:
                one["logprob"] = max(each.logprobs[number], LEAST)
                one["top"] = [
                    self._token(i) | {"logprob": max(logprob, LEAST)}
                    for i, logprob in each.top[number]
                ]
            tokens.append(one)
        return {**prompt, "tokens": [] if self.request.only_prompt else tokens}

    def _token(self, token: int) -> dict[str, Any]:
        about = {"id": token, "bytes": list(self._names.content(token))}
        return about | ({"special": True} if self._names.is_special(token) else {})

    def _described(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]]
    ) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._names.text(token),
                "logprob": max(logprob, LEAST),
                "bytes": list(self._names.content(token)),
            }

        return one(token, logprob) | {"top_logprobs": [one(*pair) for pair in top]}

    def _listed(self, told: list[Told], offsets: "_Offsets", *, has_first: bool) -> dict[str, Any]:
        """The four lists of a completion. The first token of a prompt has no log-probability."""
        names = self._names
        numbers: list[float | None] = [max(logprob, LEAST) for _, logprob, _ in told]
        tops: list[dict[str, float] | None] = []
        for token, logprob, top in told:
            pairs = [*reversed(top), (token, logprob)]  # of one name, the likeliest
            tops.append({names.text(i): max(number, LEAST) for i, number in pairs})
        if has_first:
            numbers[0] = tops[0] = None
        return {
            "tokens": [names.text(token) for token, _, _ in told],
            "token_logprobs": numbers,
            "top_logprobs": tops if self.request.config.logprobs else None,
            "text_offset": [offsets.next(token) for token, _, _ in told],
        }


def _of_prompt(prompt: list[int], details: list[TokenDetails]) -> list[Told]:
    rest = zip(prompt[1:], details, strict=True)
    first: Told = (prompt[0], 0.0, ())
    return [first, *((token, each.logprob, each.top) for token, each in rest)]


class _Offsets:
    """Where each token of a text begins, in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._at = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token: int) -> int:
        """That of the next token."""
        at = self._at
        self._at += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return at


def event(content: dict[str, Any]) -> str:
    """A server-sent event with a JSON value."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_object(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
