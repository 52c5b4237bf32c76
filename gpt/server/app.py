"""The HTTP application: OpenAI's paths over the engine."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt.config import ServeConfig, UsageError, quoted
from gpt.data.tokenizer import Tokenizer
from gpt.files import parse_json
from gpt.generation.attention_weights import attention_of_last
from gpt.model.gpt import GPT
from gpt.server import requests
from gpt.server.engine import Engine, Event, Failure, FullError, Job
from gpt.server.guard import Guard
from gpt.server.openapi import description
from gpt.server.page import PAGES, page_routes
from gpt.server.responses import Answer, error_object, event
from gpt.server.schema import RequestError

BODY_SECONDS = 30.0
"""How long a client may take to send its request."""
STATUS = {"invalid": 400, "timeout": 504, "failed": 503}
KIND = {"invalid": "invalid_request_error", "timeout": "timeout", "failed": "server_error"}
T = TypeVar("T")
Parse = Callable[[tuple[GPT, Tokenizer], Any, requests.Limits], T]


class Server:
    """The handlers of the paths."""

    def __init__(
        self, engine: Engine, model: tuple[GPT, Tokenizer], config: ServeConfig, length: int
    ) -> None:
        """``length`` is how many tokens a prompt and its answer may have together."""
        self.engine, self.model, self.config = engine, model, config
        self.limits = requests.Limits(config.served_name, length)
        self.created = int(time.time())
        self._parsers = anyio.CapacityLimiter(4)  # threads that read requests

    def app(self) -> ASGIApp:
        """The application."""
        routes = [
            *page_routes(),
            Route("/v1/attention", self.attention, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
        ]
        handlers: Any = {HTTPException: _http_error, Exception: _unexpected}
        return Guard(
            Starlette(routes=routes, exception_handlers=handlers),
            self.engine.metrics,
            api_key=self.config.api_key,
            host=self.config.host if self.config.is_local else None,
            origins=self.config.allow_origin,
            paths=[route.path for route in routes],
            open_paths=PAGES,
        )

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, requests.completion)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, requests.chat)

    async def attention(self, request: Request) -> Response:
        """Where the last token of a text looks, by layer and head."""
        try:
            body = await _body(request, self.config.max_body)
            call = functools.partial(self._parsed, requests.attention, body)
            ids = await anyio.to_thread.run_sync(call, limiter=self._parsers)
            found = self.engine.call(functools.partial(attention_of_last, self.model[0], ids))
            weights = await asyncio.wrap_future(found)
        except UsageError as error:
            return _refused(error)
        except FullError as error:
            return _busy(error)
        rounded = [[[round(w, 4) for w in head] for head in layer] for layer in weights.tolist()]
        return JSONResponse({"object": "attention", "weights": rounded})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        """The model of this name."""
        name = request.path_params["name"]
        if name != self.limits.name:
            message = f"the model {quoted(name)} does not exist; this server has "
            content = error_object(
                f"{message}{self.limits.name!r}", "invalid_request_error", code="model_not_found"
            )
            return JSONResponse(content, 404)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self.limits.name, "object": "model", "created": self.created}
        has_chat = self.model[1].chat is not None
        return {
            **about, "owned_by": "gpt", "max_model_len": self.limits.length, "has_chat": has_chat,
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        """Whether the model's thread runs."""
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        engine = self.engine
        gauges = {
            "running_sequences": ("Sequences in the batch", engine.running),
            "waiting_sequences": ("Sequences that wait for a place", engine.waiting),
            "cache_bytes": ("Keys and values of running sequences", engine.cache_bytes),
            "prefix_cache_bytes": ("Keys and values of earlier ones", engine.prefixes.nbytes),
        }
        kind = "text/plain; version=0.0.4"
        return PlainTextResponse(engine.metrics.text(gauges), media_type=kind)

    async def openapi(self, request: Request) -> Response:
        """The description of this interface."""
        return JSONResponse(description())

    async def _answer(self, request: Request, parse: Parse[requests.Request]) -> Response:
        try:
            self.engine.check_room()
            body = await _body(request, self.config.max_body)
            call = functools.partial(self._parsed, parse, body)
            asked = await anyio.to_thread.run_sync(call, limiter=self._parsers)
            events: asyncio.Queue[Event] = asyncio.Queue()
            job = self._job(asked, events)
            answer = Answer(asked, job, self.model[1], self.limits.name)
            self.engine.submit(job)
        except UsageError as error:
            return _refused(error)
        except FullError as error:
            return _busy(error)
        if asked.stream:
            end = functools.partial(self.engine.cancel, job)
            return _Streaming(self._stream(answer, events), end)
        return await self._whole(request, answer, job, events)

    def _parsed(self, parse: Parse[T], body: bytes) -> T:
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"the request is not UTF-8 at byte {error.start:,}") from None
        try:
            return parse(self.model, parse_json(text, "the request"), self.limits)
        except RequestError:
            raise
        except UsageError as error:
            raise RequestError(str(error)) from None
        except RecursionError:
            raise RequestError("the request is nested too deeply") from None

    def _job(self, asked: requests.Request, events: "asyncio.Queue[Event]") -> Job:
        loop = asyncio.get_running_loop()

        def deliver(each: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, each)

        return Job(
            asked.prompts,
            asked.config,
            deliver,
            ends=asked.ends,
            describes_prompts=asked.echo and asked.config.logprobs is not None,
            begins=not asked.is_begun if asked.is_chat else None,
            streams=asked.stream,
            seconds=self.config.max_seconds,
        )

    async def _whole(
        self, request: Request, answer: Answer, job: Job, events: "asyncio.Queue[Event]"
    ) -> Response:
        """The whole answer. A client that leaves ends the job."""
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            while not answer.is_whole:
                coming = asyncio.ensure_future(events.get())
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    return Response(status_code=499)  # nobody reads it
                each = coming.result()
                if isinstance(each, Failure):
                    return JSONResponse(_failure(each), STATUS[each.kind])
                answer.add(each)
            return await anyio.to_thread.run_sync(lambda: JSONResponse(answer.whole()))
        finally:
            gone.cancel()
            self.engine.cancel(job)

    async def _stream(self, answer: Answer, events: "asyncio.Queue[Event]") -> AsyncIterator[str]:
        """The answer's events."""
        for opening in answer.openings():
            yield opening
        while not answer.is_whole:
            each = await events.get()
            if isinstance(each, Failure):
                yield event(_failure(each))
                return
            yield answer.chunk(each)
        if answer.request.include_usage:
            yield answer.closing()
        yield "data: [DONE]\n\n"


class _Streaming(StreamingResponse):
    """A stream of events. It calls ``end`` at its end, also when the client has left or does not
    read.
    """

    def __init__(self, pieces: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(pieces, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytes:
    """The request's body; :class:`RequestError` if it is too large, too slow, or not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the request needs the header Content-Type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > 4 * most:  # what is less is read, so that the client sees the answer
                    break
    except TimeoutError:
        raise RequestError(
            f"the request took more than {BODY_SECONDS:g} s to arrive", status=408
        ) from None
    except ClientDisconnect:
        raise RequestError("the client has gone") from None
    if size > most:
        raise RequestError(f"the request has more than {most:,} bytes", status=413)
    return b"".join(parts)


def _refused(error: UsageError) -> Response:
    """The answer to a request that is wrong."""
    if not isinstance(error, RequestError):
        return JSONResponse(error_object(str(error), "invalid_request_error"), 400)
    content = error_object(str(error), "invalid_request_error", param=error.param, code=error.code)
    headers = {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(content, error.status, headers)


def _busy(error: FullError) -> Response:
    content = error_object(str(error), "rate_limit_error", code="rate_limit_exceeded")
    return JSONResponse(content, 429, {"Retry-After": str(error.seconds)})


def _failure(failure: Failure) -> dict[str, Any]:
    return error_object(failure.message, KIND[failure.kind])


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        message = f"there is nothing at {quoted(request.url.path)}; see /openapi.json"
    else:
        message = f"{request.method} is not allowed at {quoted(request.url.path)}"
    content = error_object(message, "invalid_request_error")
    return JSONResponse(content, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(error_object("the server failed; its log has more", "server_error"), 500)
