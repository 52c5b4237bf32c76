"""The fields of requests as JSON Schema: one table that checks requests and describes them.

:func:`check` knows the few keywords that the tables use, and raises one sentence for what is wrong.
"""

from collections.abc import Mapping
from typing import Any

from gpt.config import UsageError, nearest, quoted

Schema = Mapping[str, Any]
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "a text"),
    "integer": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
    "array": ((list,), "a list"),
    "object": ((dict,), "an object"),
    "null": ((type(None),), "null"),
}
"""Python's types for JSON's, and what a sentence calls them."""


class RequestError(UsageError):
    """A request that cannot be answered, with OpenAI's fields for it."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def one_of(*types: str, **rules: Any) -> Schema:
    """The schema of a value of any of ``types``, or null."""
    return {"type": [*types, "null"], **rules}


def record(properties: Mapping[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """The schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def check(value: Any, schema: Schema, name: str = "") -> None:
    """:class:`RequestError` names the first field of ``value`` that the ``schema`` refuses."""
    if "anyOf" in schema:
        _check_any(value, schema, name)
        return
    wanted = schema.get("type", list(TYPES))
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not any(_is(value, kind) for kind in wanted):
        _refuse(value, _listed([TYPES[kind][1] for kind in wanted if kind != "null"]), name)
    if value is None:
        return
    if "enum" in schema and value not in schema["enum"]:
        _refuse(value, "one of " + ", ".join(map(str, schema["enum"])), name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(value, schema, name)
    elif isinstance(value, str):
        _check_size(len(value), "character", "Length", schema, name)
    elif isinstance(value, list):
        _check_size(len(value), "item", "Items", schema, name)
        for number, item in enumerate(value if "items" in schema else ()):
            check(item, schema["items"], f"{name}[{number}]")
    elif isinstance(value, dict):
        _check_object(value, schema, name)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES[kind][0])


def _refuse(value: Any, must: str, name: str) -> None:
    raise RequestError(
        f"{name or 'the request'} is {quoted(value)}, and must be {must}", param=name
    )


def _listed(words: list[str]) -> str:
    return " or ".join(words)


def _check_any(value: Any, schema: Schema, name: str) -> None:
    for choice in schema["anyOf"]:
        try:
            check(value, choice, name)
        except RequestError:
            continue
        return
    _refuse(value, schema["title"], name)


def _check_number(value: float, schema: Schema, name: str) -> None:
    least, most = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")
    if not abs(value) < 2**63:  # also what is not a number
        raise RequestError(f"{name} must be below 2**63", param=name)
    if least is not None and value < least:
        _refuse(value, f"at least {least}", name)
    if above is not None and value <= above:
        _refuse(value, f"above {above}", name)
    if most is not None and value > most:
        _refuse(value, f"at most {most}", name)


def _check_size(n: int, what: str, keyword: str, schema: Schema, name: str) -> None:
    least, most = schema.get(f"min{keyword}", 0), schema.get(f"max{keyword}", n)
    if not least <= n <= most:
        bound = f"at least {least}" if n < least else f"at most {most}"
        number = least if n < least else most
        s = "" if number == 1 else "s"
        raise RequestError(
            f"{name} has {n:,} {what}{'' if n == 1 else 's'}, and must have {bound} {what}{s}",
            param=name,
        )


def _check_object(value: dict[str, Any], schema: Schema, name: str) -> None:
    fields, start = schema.get("properties", {}), f"{name}." if name else ""
    more = schema.get("additionalProperties", True)
    for key in schema.get("required", ()):
        if key not in value:
            raise RequestError(f"{start}{key} is missing", param=f"{start}{key}")
    for key, item in value.items():
        if key in fields:
            check(item, fields[key], f"{start}{key}")
        elif more is False:
            advice = nearest(key, fields)
            raise RequestError(f"{start}{quoted(key)} is not a known field{advice}", param=key[:99])
        elif isinstance(more, Mapping):
            check(item, more, f"{start}{key}")
