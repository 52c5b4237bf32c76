"""Initial weights: each module with parameters of its own has a ``reset``."""

import torch
from torch import Tensor, nn

STD = 0.02


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """Give the module and those in it their initial weights. A ``reset`` method covers all that the
    module holds. ``TypeError`` for parameters that no ``reset`` covers.
    """
    own = getattr(module, "reset", None)
    if own is not None:
        own()
        return
    if isinstance(module, nn.Linear | nn.Embedding):
        normal(module)
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(module).__name__} has parameters and no reset()")
    for child in module.children():
        reset(child)


@torch.no_grad()
def normal(module: nn.Module, std: float = STD) -> None:
    """Weights of N(0, ``std``), biases of zero."""
    nn.init.normal_(module.get_parameter("weight"), std=std)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)


def table(rows: Tensor) -> nn.Embedding:
    """An embedding of ``rows``. ``nn.Embedding`` itself would draw weights first, which takes a
    second on ``meta``.
    """
    made: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    return made
