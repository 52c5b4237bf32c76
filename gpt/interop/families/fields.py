"""Fields of Hugging Face's ``config.json`` that several families share."""

from collections.abc import Sequence
from typing import Any

from gpt.config import Activation, UsageError, quoted

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Maps their names of activations to this project's."""
ACTIVATION_NAMES: dict[Activation, str] = {
    "gelu_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "relu_squared": "relu2",
    "silu": "silu",
    "tanh": "tanh",
}
"""Maps this project's names of activations to theirs."""


def field(
    theirs: dict[str, Any],
    name: str,
    default: Any,
    kind: type | tuple[type, ...] = int,
    *,
    aliases: Sequence[str] = (),
) -> Any:
    """The value of a field under its name or one of its ``aliases``; else ``default``.

    ``null`` counts as not given. ``UsageError`` for a value of another ``kind``, and if two names
    have different values.
    """
    given = {key: theirs[key] for key in (name, *aliases) if key in theirs}
    given = {key: value for key, value in given.items() if value is not None}
    for value in given.values():
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right or value != next(iter(given.values())):
            names = " and ".join(given)
            raise UsageError(f"{names} is {quoted(value)}, and must be like {default!r}")
    return next(iter(given.values()), default)


def activation(theirs: dict[str, Any], name: str, default: str) -> Activation:
    """The activation that a field names; ``UsageError`` if it is not supported."""
    value = field(theirs, name, default, str)
    if value not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise UsageError(f"{name} is {quoted(value)}, and must be one of {names}")
    return ACTIVATIONS[value]


def check_not_quantised(theirs: dict[str, Any]) -> None:
    """``UsageError`` if the weights are quantised."""
    if theirs.get("quantization_config") is not None:
        raise UsageError("quantization_config is given, and quantised weights are not supported")
