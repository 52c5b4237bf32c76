"""Mixtures of experts in training: how evenly the tokens are spread over them."""

import torch
from torch import Tensor, nn

from gpt.model.moe import MoE
from gpt.training.parallel import World


def take_loads(model: nn.Module, world: World, *, rebalance: bool) -> Tensor | None:
    """After a step: start to count the loads anew, and with ``rebalance`` move each layer's
    preferences by the load of all processes.

    Returns the load of the busiest expert over the mean, averaged over layers (1: even); ``None``
    for a model without experts.
    """
    layers = [m for m in model.modules() if isinstance(m, MoE) and m.load is not None]
    if not layers:
        return None
    loads = world.sum(torch.stack([layer.load for layer in layers if layer.load is not None]))
    for layer, load in zip(layers, loads, strict=True):
        if rebalance:
            layer.rebalance(load)
        layer.load = None
    return (loads.amax(dim=1) / loads.float().mean(dim=1)).mean()
