"""The server process: uvicorn over the application, from its socket to its end."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from gpt.config import UsageError, foreign
from gpt.server.engine import Engine

LAST_SECONDS = 10.0
"""Seconds in which a client may read the rest of its answer after the server has closed the
connection, or is told to end."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that has this address, and does not listen yet; ``UsageError`` if that is not
    possible.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as unless_bound:
            bound = unless_bound.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            unless_bound.pop_all()
    except OSError as error:
        reason = foreign(error.strerror or error)
        raise UsageError(
            f"cannot listen on {foreign(host)} port {port}: {reason}; choose another --host or "
            "--port (0: a free one)"
        ) from None
    return bound


class _Server(uvicorn.Server):
    """Which does not wait for clients that do not read their answers."""

    def __init__(self, settings: uvicorn.Config, engine: Engine) -> None:
        super().__init__(settings)
        self._engine = engine
        self._closing: dict[Any, float] = {}  # connections that are closed here, since when

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn does, ten times a second. Connections that were closed here are ended if their
        clients do not read what is left.
        """
        now, closing = time.monotonic(), self._closing
        self._closing = {
            each: closing.get(each, now)
            for each in self.server_state.connections
            if each.transport.is_closing()
        }
        for connection, since in self._closing.items():
            if now - since > LAST_SECONDS:
                connection.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does: answer what was asked. Then end the connections that are left."""
        ending = asyncio.ensure_future(self._end_connections())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_connections(self) -> None:
        idle = 0.0
        while idle < LAST_SECONDS:
            await asyncio.sleep(0.1)
            idle = 0.0 if self._engine.running or self._engine.waiting else idle + 0.1
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def server(app: ASGIApp, engine: Engine, *, log_level: str = "warning") -> uvicorn.Server:
    """The server; its ``run(sockets=[...])`` answers requests until SIGTERM or SIGINT."""
    settings = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
    )
    return _Server(settings, engine)
