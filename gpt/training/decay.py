"""Weight decay, and its cautious form: only those weights decay that the step makes smaller anyway
(Chen et al., 2025, arXiv:2510.12402).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


def decay(parameter: Tensor, factor: float, update: Tensor | None = None) -> None:
    """Subtract ``factor`` times the weights, in place; with the ``update`` that is to be
    subtracted, only where it has the weight's sign.
    """
    if update is None:
        parameter.mul_(1 - factor)
    elif factor:
        parameter.mul_(1 - factor * (update * parameter > 0))


class CautiousAdamW(AdamW):
    """AdamW with cautious weight decay. The sign of an update is that of the gradients' mean."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        kept = [group["weight_decay"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                self._decay(group)
                group["weight_decay"] = 0.0
            super().step()
        finally:
            for group, factor in zip(self.param_groups, kept, strict=True):
                group["weight_decay"] = factor

    def _decay(self, group: dict[str, Any]) -> None:
        for parameter in group["params"] if group["weight_decay"] else ():
            if parameter.grad is not None:
                mean: Tensor = parameter.grad
                if parameter in self.state:  # from the second step on
                    mean = self.state[parameter]["exp_avg"].lerp(mean, 1 - group["betas"][0])
                decay(parameter, group["lr"] * group["weight_decay"], mean)
