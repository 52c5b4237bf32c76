"""Changes to a finished model: a shorter context, another vocabulary, another dropout."""

import dataclasses

import torch
from torch import Tensor, nn

from gpt.model.attention import CausalSelfAttention
from gpt.model.dropout import Dropout
from gpt.model.gpt import GPT
from gpt.model.initial import table


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
    new = rows.mean(dim=0, keepdim=True).expand(max(0, n - len(rows)), -1)
    return torch.cat([rows[:n], new])
