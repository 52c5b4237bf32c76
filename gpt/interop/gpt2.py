"""GPT-2 as Hugging Face names it: the configuration and the tensors, both ways.

The tensors differ in name, and the four matrices of a block are stored transposed (``Conv1D``).
Reference: ``transformers``' ``GPT2Config`` and ``GPT2LMHeadModel``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.config import Activation, ModelConfig, UsageError, foreign, quoted

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_ACTIVATION_NAMES: dict[Activation, str] = {
    "gelu_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
_ALIASES = {  # which GPT2Config takes as well
    "n_positions": ("max_position_embeddings",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
}
_MODULES = {
    "embed": "wte",
    "position": "wpe",
    "norm": "ln_f",
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""What DataParallel, torch.compile and FSDP put into the names of what they wrap."""
_MATRIX = re.compile(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight")
_LAYER = re.compile(r"h\.(\d+)\.")
_DROPOUTS = ("resid", "embd", "attn")
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def model_config(
    theirs: dict[str, Any], *, say: Callable[[str], None] = lambda text: None
) -> ModelConfig:
    """The ``ModelConfig`` of a ``config.json``; ``UsageError`` names a field that is not
    supported. ``say`` is told what the model has otherwise.
    """

    def get(name: str, default: Any, kind: type | tuple[type, ...] = int) -> Any:
        given = {key: theirs[key] for key in (name, *_ALIASES.get(name, ())) if key in theirs}
        given = {key: value for key, value in given.items() if value is not None}
        for value in given.values():
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not right or value != next(iter(given.values())):
                names = " and ".join(given)
                raise UsageError(f"{names} is {quoted(value)}, and must be like {default!r}")
        return next(iter(given.values()), default)

    if theirs.get("model_type") != "gpt2":
        raise UsageError(f"model_type is {quoted(theirs.get('model_type'))}, and must be 'gpt2'")
    if theirs.get("quantization_config") is not None:
        raise UsageError("quantization_config is given, and quantised weights are not supported")
    if get("add_cross_attention", False, bool):
        raise UsageError("add_cross_attention is true, and a model with a decoder alone has none")
    number = (int, float)
    activation = get("activation_function", "gelu_new", str)
    if activation not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise UsageError(f"activation_function is {quoted(activation)}, and must be one of {names}")
    dropouts = {f"{place}_pdrop": get(f"{place}_pdrop", 0.1, number) for place in _DROPOUTS}
    if len(set(dropouts.values())) > 1:
        each = ", ".join(f"{name} {quoted(value)}" for name, value in dropouts.items())
        say(f"{each}: a model here has one dropout, for training alone, and takes resid_pdrop's")
    vocab_size = get("vocab_size", 50257)
    if vocab_size == 0:
        raise UsageError("vocab_size is 0, and must be at least 1")
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=get("n_positions", 1024),
        n_layer=get("n_layer", 12),
        n_head=get("n_head", 12),
        n_embd=get("n_embd", 768),
        n_inner=get("n_inner", 0),
        dropout=dropouts["resid_pdrop"],
        norm_eps=get("layer_norm_epsilon", 1e-5, number),
        activation=_ACTIVATIONS[activation],
        tie_embeddings=get("tie_word_embeddings", True, bool),
        scale_attention=get("scale_attn_weights", True, bool),
        scale_attention_by_layer=get("scale_attn_by_inverse_layer_idx", False, bool),
    )


def check_sizes(path: Path, config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """``UsageError`` names a size in the ``config.json`` at ``path`` that weights of these
    ``shapes``, by their names without prefix, do not have.

    To be asked before a model is made: it has what the files hold, and no layer more.
    """
    where = foreign(path)
    layers = {match[1] for name in shapes if (match := _LAYER.match(name))}
    if config.n_layer > len(layers):
        raise UsageError(
            f"{where}: n_layer is {config.n_layer:,}, and the weights beside it have "
            f"{len(layers):,} layers"
        )
    for name, fields, wanted in (
        ("wte.weight", "vocab_size and n_embd", [config.vocab_size, config.n_embd]),
        ("wpe.weight", "n_positions and n_embd", [config.context_length, config.n_embd]),
        (
            "h.0.mlp.c_fc.weight",
            "n_embd and n_inner",
            [config.n_embd, config.resolved().n_inner],
        ),
    ):
        if name not in shapes:
            raise UsageError(f"the weights in {foreign(path.parent)} lack {name}")
        if list(shapes[name]) != wanted:
            raise UsageError(
                f"{where}: {fields} ask for {name} of the shape {wanted}, and the weights beside "
                f"it have the shape {list(shapes[name])}"
            )


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model, which has zeros for the biases that it lacks; ``UsageError``
    names what GPT-2 cannot express.
    """
    shape = config.resolved()
    for name, value, usual in (
        ("n_kv_head", shape.n_kv_head, shape.n_head),
        ("head_dim", shape.head_dim, shape.n_embd // shape.n_head),
    ):
        if value != usual:
            raise UsageError(f"GPT-2 in Hugging Face's form cannot express model.{name} {value}")
    dropouts = {f"{place}_pdrop": config.dropout for place in _DROPOUTS}
    return dropouts | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # the same, for what reads the old name (llama.cpp)
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner or None,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.scale_attention,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
    }


def bare_name(theirs: str) -> str:
    """Their name of a tensor, without the prefix ``transformer.`` and the names of wrappers."""
    parts = [part for part in theirs.split(".") if part not in _WRAPPERS]
    return ".".join(parts).removeprefix("transformer.")


def hugging_face_name(name: str) -> str:
    """Their name of this project's parameter ``name``, without the prefix ``transformer.``."""
    if name == "head.weight":
        return "lm_head.weight"
    module, kind = name.rsplit(".", 1)
    if module.startswith("blocks."):
        _, layer, part = module.split(".", 2)
        return f"h.{layer}.{_MODULES[part]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def is_transposed(name: str) -> bool:
    """Whether they store this project's parameter ``name`` transposed."""
    return _MATRIX.fullmatch(name) is not None


def is_buffer(name: str) -> bool:
    """Whether their tensor ``name`` (without the prefix) is the causal mask that old files
    carry.
    """
    return _BUFFER.fullmatch(name) is not None
