"""Normalisation of the residual stream. A norm is a module with ``weight`` and ``reset``."""

from collections.abc import Callable

from torch import nn

from gpt.config import ModelConfig, Norm


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (arXiv:1607.06450), as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)

    def reset(self) -> None:
        """Weights of one, biases of zero."""
        self.reset_parameters()


NORMS: dict[Norm, Callable[[ModelConfig], nn.Module]] = {"layer": LayerNorm}
"""The configuration's ``norm`` to what makes one."""
