"""Fields of Hugging Face's ``config.json`` that several families share."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpt.config import Activation, UsageError, nearest, quoted

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


OTHER_NAMES = {
    "window": "sliding_window",
    "window_pattern": "layer_types",
    "rotary_base": "rope_theta",
    "rotary_base_local": "rope_local_base_freq",
    "rotary_fraction": "partial_rotary_factor",
    "rotary_scaling": "rope_type",
    "scale_attention_width": "query_pre_attn_scalar",
    "bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
"""Their names of fields that no family's table has. Messages need them."""
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def field(
    theirs: Mapping[str, Any],
    name: str,
    default: Any,
    kind: type = int,
    *,
    aliases: Sequence[str] = (),
) -> Any:
    """The value of a field under its name or one of its ``aliases``; else ``default``.

    ``null`` counts as not given. A ``float`` may be a whole number. ``UsageError`` for a value of
    another ``kind``, and if two names have different values.
    """
    given = {key: theirs[key] for key in (name, *aliases) if theirs.get(key) is not None}
    right = (int, float) if kind is float else kind
    for key, value in given.items():
        if not isinstance(value, right) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{key} is {quoted(value)}, and must be {_KINDS[kind]}")
    found = [*given.values(), default][0]
    for key, value in given.items():
        if value != found:
            first = next(iter(given))
            raise UsageError(
                f"{key} is {quoted(value)}, and must be the same as {first}, which is "
                f"{quoted(found)}"
            )
    return found


def activation(
    theirs: Mapping[str, Any], name: str, default: str, known: Mapping[str, Activation]
) -> Activation:
    """The activation that a field names; ``UsageError`` if it is not one of the ``known`` ones."""
    value = field(theirs, name, default, str)
    if value not in known:
        raise UsageError(
            f"{name} is {quoted(value)}, and must be one of {', '.join(known)}"
            f"{nearest(value, known)}"
        )
    return known[value]


def check_not_quantised(theirs: Mapping[str, Any]) -> None:
    """``UsageError`` if the weights are quantised."""
    if theirs.get("quantization_config") is not None:
        raise UsageError("quantization_config is given, and quantised weights are not supported")
