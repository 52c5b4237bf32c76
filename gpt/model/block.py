"""One block: attention and a feed-forward layer, each added to the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from gpt.config import ModelConfig, NormPlacement
from gpt.model.attention import CausalSelfAttention
from gpt.model.dropout import Dropout
from gpt.model.mlp import MLPS
from gpt.model.norm import NORMS
from gpt.model.shared import Shared


class Block(nn.Module):
    """Layer number ``layer``, from 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = Dropout(config.dropout)
        self.residual: Residual = RESIDUALS[config.norm_placement]

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        return self.residual(self, x, shared)


Residual = Callable[[Block, Tensor, Shared], Tensor]


def pre_norm(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """The norm comes before each branch, and the stream itself is never normalised (GPT-2)."""
    x = x + block.dropout(block.attn(block.attn_norm(x), shared))
    out: Tensor = x + block.dropout(block.mlp(block.mlp_norm(x)))
    return out


RESIDUALS: dict[NormPlacement, Residual] = {"pre": pre_norm}
"""The configuration's ``norm_placement`` to how a block adds up its branches."""
