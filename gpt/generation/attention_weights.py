"""Where the model looks: the attention weights of a text's last token, by layer and head.

A layer's own attention, over values that are the rows of the identity matrix, gives its weights. So
masks, windows, sinks and every way of scoring count as they do in the model.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt.config import UsageError
from gpt.generation.prefill import evaluation_mode
from gpt.model import attention
from gpt.model.attend import attend
from gpt.model.gpt import GPT

_one = threading.Lock()


@torch.inference_mode()
def attention_of_last(model: GPT, ids: list[int]) -> Tensor:
    """The weights ``[layers, H, T]`` with which the last of the T tokens ``ids`` looks at each of
    them, in float32 on the CPU. ``UsageError`` for a layer whose weights cannot be computed.
    """
    found: list[Tensor] = []
    tokens = torch.tensor([ids], device=model.device)
    with evaluation_mode(model), _recorded(found):
        model.features(tokens)
    if len(found) != model.config.n_layer:
        raise UsageError("the attention of this model's layers has no weights to show")
    return torch.stack(found)


@contextlib.contextmanager
def _recorded(found: list[Tensor]) -> Iterator[None]:
    """While inside, each call of :func:`gpt.model.attend.attend` by this thread adds the weights
    ``[H, T]`` of the last query.
    """
    here, layers = threading.get_ident(), vars(attention)

    @functools.wraps(attend)
    def recording(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        if threading.get_ident() == here:
            found.append(_weights(q, k, **settings))
        return attend(q, k, v, **settings)

    with _one:  # others may generate meanwhile, but only one records
        layers["attend"] = recording
        try:
            yield
        finally:
            layers["attend"] = attend


def _weights(q: Tensor, k: Tensor, **settings: Any) -> Tensor:
    if settings.get("flex") is not None:
        raise UsageError("the attention of this model has no weights to show on a GPU; use a CPU")
    B, H, T, _ = k.shape
    plain = settings.get("mask") is None and settings.get("blocks") is None
    if plain:  # one query sees every key
        q = q[:, :, -1:]
    identity = torch.eye(T, dtype=k.dtype, device=k.device).expand(B, H, T, T)
    weights = attend(q, k, identity, **settings)
    return weights[0, :, -1].float().cpu()
