"""The page at ``/``: some files in static/, without anything from another place."""

import functools
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("static")
PAGES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/pane.js": ("pane.js", "text/javascript"),
    "/tokens.js": ("tokens.js", "text/javascript"),
}
"""The files by path, with their types."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        # A second server on this machine may answer beside this one.
        "connect-src 'self' http://127.0.0.1:* http://localhost:*",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page's code may load and ask."""


def page_routes() -> list[Route]:
    """The routes of the page's files."""
    return [Route(path, functools.partial(_file, *about)) for path, about in PAGES.items()]


async def _file(name: str, kind: str, request: Request) -> Response:
    return Response(_content(name), media_type=kind, headers={"Content-Security-Policy": POLICY})


@functools.cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
