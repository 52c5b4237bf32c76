"""The OpenAPI description of the server, from the tables that check its requests."""

from typing import Any

import gpt
from gpt.server.requests import ATTENTION, CHAT, COMPLETION

_POSTS = {
    "/v1/completions": ("Continue one or several prompts", "Completion", COMPLETION),
    "/v1/chat/completions": ("Answer a conversation", "Chat", CHAT),
    "/v1/attention": ("Where the last token of a text looks", "Attention", ATTENTION),
}
_GETS = {
    "/v1/models": "The model",
    "/v1/models/{name}": "The model of this name",
    "/health": "Whether the server runs",
    "/metrics": "Counts in Prometheus' text format",
    "/openapi.json": "This description",
}
ERRORS = {
    "400": "The request is wrong",
    "401": "The API key is missing or wrong",
    "403": "The caller may not use this server",
    "404": "The model does not exist",
    "408": "The request took too long to arrive",
    "413": "The request is too large",
    "429": "The queue is full; Retry-After says when to try again",
    "503": "The model failed, or the server ends",
    "504": "The answer took too long",
}


def description() -> dict[str, Any]:
    """The description, as JSON values."""
    failures = {
        status: {"description": meaning, "content": _json({"$ref": "#/components/schemas/Error"})}
        for status, meaning in ERRORS.items()
    }
    paths: dict[str, Any] = {}
    for path, (meaning, name, _) in _POSTS.items():
        body = {"required": True, "content": _json({"$ref": f"#/components/schemas/{name}"})}
        answers = {
            "description": "The answer, or with stream its events",
            "content": {**_json({"type": "object"}), "text/event-stream": {}},
        }
        paths[path] = {
            "post": {
                "summary": meaning,
                "requestBody": body,
                "responses": {"200": answers, **failures},
            }
        }
    for path, meaning in _GETS.items():
        responses: dict[str, Any] = {"200": {"description": meaning}}
        responses |= {status: failures[status] for status in ("401", "403", "404", "503")}
        get: dict[str, Any] = {"summary": meaning, "responses": responses}
        if "{name}" in path:
            text = {"type": "string"}
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": text}]
        paths[path] = {"get": get}
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    error = {"message": text, "type": text, "param": maybe, "code": maybe}
    schemas = {name: schema for _, name, schema in _POSTS.values()}
    schemas["Error"] = {"type": "object", "properties": {"error": {"properties": error}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpt", "version": gpt.__version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
