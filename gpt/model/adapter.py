"""Adapters: a few new weights over a model whose own weights are frozen and keep their names.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds ``scale * B A x`` to a linear layer's ``W x``.
Queries, keys and values are one layer here, so they share ``A``, and each has its rows of ``B``. A
bottleneck (Houlsby et al., 2019, arXiv:1902.00751) adds ``up(gelu(down(y)))`` to the output ``y``
of attention and of the feed-forward layer. A new adapter of either kind changes nothing: ``B`` and
``up`` are 0.

The layer stays the module that it was, with parameters ``adapter_a`` and ``adapter_b`` beside its
own, and a forward hook that adds the adapter's output.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import AdapterConfig, UsageError
from gpt.model.dropout import dropout
from gpt.model.gpt import GPT
from gpt.model.selection import selected

A, B = "adapter_a", "adapter_b"
BOTTLENECKS = ("attn.out", "mlp.down")


class LowRank:
    """The hook of LoRA: ``[..., N]`` plus the scaled product of ``[..., K]``. It adds to the
    layer's output in place: copies of it would be most of an adapter's own memory and time.
    """

    is_on = True

    def __init__(self, config: AdapterConfig) -> None:
        self.scale, self.dropout = config.scale, config.dropout

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.is_on:
            return out
        x = dropout(inputs[0], self.dropout) if layer.training else inputs[0]
        a, b = layer.get_parameter(A), layer.get_parameter(B)
        narrow = F.linear(x, a).to(out.dtype).flatten(0, -2)
        product = out.view(-1, out.shape[-1])
        product.addmm_(narrow, b.to(out.dtype).T, alpha=self.scale)
        return out


class Bottleneck:
    """The hook of a bottleneck: ``[..., N]`` plus a narrow layer's output for it."""

    is_on = True

    def __init__(self, config: AdapterConfig) -> None:
        self.dropout = config.dropout

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.is_on:
            return out
        y = dropout(out, self.dropout) if layer.training else out
        a, b = layer.get_parameter(A), layer.get_parameter(B)
        return out + F.linear(F.gelu(F.linear(y, a)), b)


HOOKS: dict[str, type[LowRank] | type[Bottleneck]] = {"lora": LowRank, "bottleneck": Bottleneck}
"""The configuration's ``kind`` to the hook of a layer."""


def adaptable(model: GPT) -> dict[str, nn.Module]:
    """The linear layers of the blocks by name. A router chooses experts in full precision, and is
    none of them.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("blocks.")
        and not name.endswith(".router")
        and (isinstance(module, nn.Linear) or getattr(module, "is_frozen_linear", False))
    }


def adapt(model: GPT, config: AdapterConfig, weights: Mapping[str, Tensor] | None = None) -> None:
    """Add an adapter to the model, in place, and freeze all other weights. ``weights`` are the
    adapter's own, by name (:func:`adapter_weights`); without them it is new, and changes nothing.

    ``UsageError`` if a pattern of ``config.targets`` matches no layer.
    """
    layers = adaptable(model)
    bottleneck = config.kind == "bottleneck"
    patterns = BOTTLENECKS if bottleneck else config.targets
    if bottleneck and model.config.n_expert:
        raise UsageError("adapter.kind is bottleneck, which a model with experts cannot have")
    model.requires_grad_(False)
    left = dict(weights or {})
    for name in selected(layers, patterns, "adapter.targets"):
        layer = layers[name]
        rows, columns = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        columns = rows if bottleneck else columns
        like = next(t for t in (*layer.parameters(), *layer.buffers()))
        a = torch.empty(config.rank, columns, device=like.device)
        b = torch.zeros(rows, config.rank, device=like.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if weights is not None:
            a, b = (_given(left, f"{name}.{part}", t) for part, t in ((A, a), (B, b)))
        layer.register_parameter(A, nn.Parameter(a))
        layer.register_parameter(B, nn.Parameter(b))
        layer.register_forward_hook(HOOKS[config.kind](config))
    if left:
        raise UsageError(f"the adapter has weights for {min(left)}, which its targets do not name")


def _given(left: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Remove and return the tensor ``name``. Its rank may be another one than the settings'."""
    tensor = left.pop(name, None)
    fixed = 1 if name.endswith(A) else 0
    if tensor is None or tensor.ndim != 2 or tensor.shape[fixed] != like.shape[fixed]:
        has = "is missing" if tensor is None else f"has the shape {[*tensor.shape]}"
        raise UsageError(f"the adapter does not fit the model: {name} {has}")
    return tensor.to(device=like.device, dtype=torch.float32)


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; empty if the model has none."""
    named = model.named_parameters()
    return {name: p for name, p in named if name.rpartition(".")[2] in (A, B)}


def hook_of(layer: nn.Module) -> Any:
    """The adapter's hook of a layer, or ``None``."""
    hooks = layer._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, LowRank | Bottleneck)), None)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Let the model compute what the model under its adapter does."""
    hooks = [hook for layer in model.modules() if (hook := hook_of(layer)) is not None]
    for hook in hooks:
        hook.is_on = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.is_on = True


@torch.no_grad()
def merge(model: GPT) -> None:
    """Add LoRA's products to the weights, in place, and remove the adapter: the logits stay, to
    rounding. ``UsageError`` for a bottleneck, which is not a change of weights.
    """
    for name, layer in adaptable(model).items():
        hook = hook_of(layer)
        if hook is None:
            continue
        if not isinstance(hook, LowRank):
            raise UsageError("a bottleneck adapter cannot be merged into the model's weights")
        if not isinstance(layer, nn.Linear):
            raise UsageError(
                f"{name} is stored with fewer bits, and an adapter needs float weights"
            )
        a, b, dtype = layer.get_parameter(A), layer.get_parameter(B), layer.weight.dtype
        merged = layer.weight.float() + hook.scale * (b.float() @ a.float())
        layer.weight = nn.Parameter(merged.to(dtype))
        del layer._parameters[A], layer._parameters[B]
        for key in [k for k, own in layer._forward_hooks.items() if own is hook]:
            del layer._forward_hooks[key]
    with torch.device("meta"):
        plain = GPT(model.config)
    for name, p in model.named_parameters():
        p.requires_grad_(plain.get_parameter(name).requires_grad)


def freeze(model: GPT, patterns: tuple[str, ...]) -> None:
    """Freeze the parameters whose names the patterns match. ``UsageError`` if none is left."""
    if not patterns:
        return
    named = dict(model.named_parameters())
    for name in selected(named, patterns, "training.freeze"):
        named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise UsageError(f"training.freeze is {' '.join(patterns)}, and leaves nothing to train")


def fingerprint(model: GPT, *, prefix: str = "") -> str:
    """A hash of the weights whose names begin with ``prefix``, as float32, without an adapter's."""
    digest = hashlib.sha256()
    with torch.device("meta"):
        plain = GPT(model.config)
    for name, _ in plain.named_parameters():
        if not name.startswith(prefix):
            continue
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and getattr(layer, "is_frozen_linear", False):
            numbers = layer.matrix.dense(torch.float32)
        else:
            numbers = layer.get_parameter(name.rpartition(".")[2]).detach().float()
        digest.update(name.removeprefix(prefix).encode())
        digest.update(numbers.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def was_trained_over(model: GPT, recorded: Any) -> bool:
    """Whether an adapter with this recorded fingerprint was trained over the model. Older
    versions recorded that of the blocks alone.
    """
    return any(recorded == fingerprint(model, prefix=each) for each in ("", "blocks."))
