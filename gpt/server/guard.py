"""What every request passes: who may ask, and which web pages may read the answers.

A page of any site can send requests to this machine's own addresses. So a local server answers only
to local names (against a name that is made to point here), and no request from a page whose origin
is neither the server's own nor allowed. Elsewhere the key decides.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Collection, Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt.config import quoted
from gpt.server.metrics import Metrics
from gpt.server.responses import error_object

LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
OPEN_PATHS = {"/health"}
"""Paths that need no key."""
SEND_SECONDS = 60.0
"""How long a client may read nothing of an answer that waits for it."""
PART = 1 << 18
"""Bytes of an answer that are sent at a time."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Wraps the application."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        api_key: str = "",
        host: str | None = None,
        origins: Collection[str] = (),
        paths: Collection[str] = (),
        open_paths: Collection[str] = (),
    ) -> None:
        """``host`` is the address of a server that only this machine reaches. The pages of
        ``origins`` may use it. ``paths`` are those that are counted by name, and ``open_paths``
        need no key.
        """
        self.app, self.metrics, self.paths = app, metrics, paths
        self._key = api_key.encode()
        self._names = None if host is None else {*LOCAL_NAMES, host}
        self._origins, self._open = origins, {*OPEN_PATHS, *open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, start = Headers(scope=scope), time.monotonic()
        path = scope["path"] if scope["path"] in self.paths else "other"
        refusal = self._refusal(scope, headers)
        origin = headers.get("origin", "")

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests[path, message["status"]] += 1
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added.setdefault(name, value)
                if origin in self._origins:
                    added["Access-Control-Allow-Origin"] = origin
                    added["Cross-Origin-Resource-Policy"] = "cross-origin"
                    added.add_vary_header("Origin")
            for part in _parts(message):
                try:
                    async with asyncio.timeout(SEND_SECONDS):
                        await send(part)
                except TimeoutError:
                    raise ClientDisconnect from None

        with contextlib.suppress(ClientDisconnect):
            await (refusal or self.app)(scope, receive, add_headers)
        if path.startswith("/v1/") and refusal is None and scope["method"] == "POST":
            self.metrics.request.add(time.monotonic() - start)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that may not be made."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._names is not None and _name(host) not in self._names:
            return _refused(f"the server has no name {quoted(host)}; use localhost")
        own = {f"http://{host}", f"https://{host}"}  # also behind a proxy with TLS
        if origin is not None and origin not in own and origin not in self._origins:
            return _refused(
                f"pages of {quoted(origin)} may not use this server; start it with --allow_origin"
            )
        if scope["method"] == "OPTIONS" and origin in self._origins:
            allowed = {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": headers.get(
                    "access-control-request-headers", "Authorization, Content-Type"
                ),
                "Access-Control-Max-Age": "600",
            }
            return Response(status_code=204, headers=allowed)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self._key and scope["path"] not in self._open:
            if not given:
                return _refused("the API key is missing: send Authorization: Bearer KEY", 401)
            is_own = hmac.compare_digest(given.strip().encode(), self._key)
            if kind.lower() != "bearer" or not is_own:
                return _refused("the API key is wrong", 401, "invalid_api_key")
        return None


def _parts(message: Message) -> Iterator[Message]:
    """The message, with a large body in parts: each has its own time."""
    body = message.get("body", b"")
    for start in range(0, len(body) - PART, PART):
        yield {**message, "body": body[start : start + PART], "more_body": True}
    yield {**message, "body": body[(max(0, len(body) - 1)) // PART * PART :]} if body else message


def _name(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _refused(message: str, status: int = 403, code: str | None = None) -> Response:
    kind = "authentication_error" if status == 401 else "permission_error"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(error_object(message, kind, code=code), status, headers)
