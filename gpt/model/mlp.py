"""The feed-forward half of a block: up to four times the width, a tanh-GELU, and down again."""

import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import ModelConfig


class MLP(nn.Module):
    """GPT-2's feed-forward layer, applied to every position alone (GELU: arXiv:1606.08415)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out
