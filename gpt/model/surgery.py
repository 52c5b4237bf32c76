"""Changes to a finished model: another context, another vocabulary, another dropout."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.attention import CausalSelfAttention
from gpt.model.dropout import Dropout
from gpt.model.gpt import GPT
from gpt.model.initial import table
from gpt.model.kinds import layer_kinds

ROTARY = (
    *("rotary_base", "rotary_scaling", "rotary_scaling_factor", "rotary_trained_length"),
    *("rotary_low_frequency", "rotary_high_frequency", "rotary_temperature"),
    "rotary_scaling_local",
)
"""Fields that change rotary positions, and no weight."""


@torch.no_grad()
def crop_context(model: GPT, context_length: int) -> None:
    """Shorten the context to its first ``context_length`` positions. Do not call this while a cache
    is in use. ``ValueError`` if the model's context is shorter.
    """
    if not 0 < context_length <= model.config.context_length:
        raise ValueError(
            f"context_length is {context_length}, and must be from 1 to the model's "
            f"({model.config.context_length})"
        )
    config = dataclasses.replace(model.config, context_length=context_length)
    if config.rotary_scaling != "none":  # the frequencies do not change
        trained = model.config.resolved().rotary_trained_length
        config = dataclasses.replace(config, rotary_trained_length=trained)
    model.config = config
    model.position.crop(context_length)


def extend_context(model: GPT, context_length: int, **rotary: Any) -> None:
    """Lengthen the context, and change fields of :data:`ROTARY`. No weight changes, and the trained
    length of a scaling stays that of the model before. Not while a cache is in use.

    ``ValueError`` if the context would be shorter, or if the positions are learned.
    """
    own, most = model.config.context_length, model.config.most_positions()
    if not own <= context_length <= (most or context_length):
        raise ValueError(
            f"context_length is {context_length}, and the model has {own} positions"
            + (", which are learned" if most else "")
        )
    config = dataclasses.replace(model.config, context_length=context_length, **rotary)
    if config.rotary_scaling != "none" and not config.rotary_trained_length:
        trained = model.config.resolved().rotary_trained_length
        config = dataclasses.replace(config, rotary_trained_length=trained)
    model.config, model.position.config = config, config.resolved()
    kinds = layer_kinds(config)
    model.kinds = list(dict.fromkeys(kinds))
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.config, module.kind = config.resolved(), kinds[module.layer]


def conform(model: GPT, config: ModelConfig) -> None:
    """Give the model the context, the rotary positions and the vocabulary of a ``config`` that was
    made from the model's own by the functions here.
    """
    if config.context_length < model.config.context_length:
        crop_context(model, config.context_length)
    extend_context(model, config.context_length, **{n: getattr(config, n) for n in ROTARY})
    if config.vocab_size != model.config.vocab_size:
        resize_vocabulary(model, config.vocab_size)


@torch.no_grad()
def resize_vocabulary(model: GPT, vocab_size: int) -> None:
    """Cut the vocabulary to its first tokens, or add rows that are the mean of the others."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}, and must be at least 1")
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    model.embed = table(_resized(model.embed.weight, vocab_size))
    model.head.weight = nn.Parameter(_resized(model.head.weight, vocab_size))
    model.head.out_features = vocab_size
    if model.pointer is not None:
        model.pointer.vocab_size = vocab_size
    for module in model.modules():
        if isinstance(module, CausalSelfAttention) and module.values is not None:
            module.values = table(_resized(module.values.weight, vocab_size))
    model.tie_weights()


def set_dropout(model: GPT, p: float) -> None:
    """Change the probability of every dropout."""
    model.config = dataclasses.replace(model.config, dropout=p)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = p
        elif isinstance(module, CausalSelfAttention):
            module.dropout = p


def _resized(rows: Tensor, n: int) -> Tensor:
    # in float64, so that all machines round it alike
    mean = rows.double().mean(dim=0, keepdim=True).to(rows)
    return torch.cat([rows[:n], mean.expand(max(0, n - len(rows)), -1)])
