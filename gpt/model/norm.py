"""Normalisation. A norm is a module with ``weight`` and ``bias`` (or ``None``), and ``reset``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import training_kernels
from gpt.config import ModelConfig, Norm


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (arXiv:1607.06450), as in GPT-2."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        has_bias = config.resolved().norm_bias == "yes"
        self.width = width
        super().__init__(
            width, eps=config.norm_eps, elementwise_affine=config.norm_weight, bias=has_bias
        )

    def reset(self) -> None:
        """Weights of one, biases of zero."""
        self.reset_parameters()


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467): no mean is subtracted."""

    feeds_products = False
    """Whether only matrix products read the result."""

    def __init__(self, config: ModelConfig, width: int, *, can_have_bias: bool = True) -> None:
        super().__init__()
        self.width, self.eps = width, config.norm_eps
        has_bias = can_have_bias and config.resolved().norm_bias == "yes"
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        if self.bias is None and training_kernels.takes(x, self.weight):
            return training_kernels.rms_norm(x, self.weight, self.eps, self._dtype_after(x))
        weight = None if self.weight is None else self.weight.to(x.dtype)
        out = F.rms_norm(x, (self.width,), weight, self.eps)
        return out if self.bias is None else out + self.bias

    def _dtype_after(self, x: Tensor) -> torch.dtype:
        """The dtype of the result: autocast's if only products read it, as they round it anyway."""
        if not (self.feeds_products and torch.is_autocast_enabled("cpu")):
            return x.dtype
        dtype = torch.get_autocast_dtype("cpu")
        return dtype if dtype in training_kernels.TYPES else x.dtype

    @torch.no_grad()
    def reset(self) -> None:
        """Weights of one, biases of zero."""
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()


NORMS: dict[Norm, Callable[[ModelConfig, int], nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
}
"""The configuration's ``norm`` to what makes one of a given width."""


def make_norm(config: ModelConfig, *, feeds_products: bool = False) -> nn.Module:
    """A norm of the residual stream. ``feeds_products``: only matrix products read its result."""
    norm = NORMS[config.norm](config, config.n_embd)
    if isinstance(norm, RMSNorm):
        norm.feeds_products = feeds_products
    return norm
