"""One block: attention and a feed-forward layer, each added to the residual stream."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from gpt.config import ModelConfig, NormPlacement
from gpt.model.attention import CausalSelfAttention
from gpt.model.dropout import Dropout
from gpt.model.mlp import MLPS
from gpt.model.moe import MoE
from gpt.model.norm import make_norm
from gpt.model.shared import Shared


class Block(nn.Module):
    """Layer number ``layer``, from 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.residual = RESIDUALS[config.norm_placement]
        self.alpha = (2 * config.n_layer) ** 0.25
        # without a final norm, the norms' results are the residual stream, which keeps its dtype
        feeds = self.residual.final_norm
        has_one_norm = "mlp_norm" not in self.residual.norms
        is_routed = config.n_expert > 0  # a router's scores are computed in float32
        self.attn_norm = make_norm(
            config, feeds_products=feeds and not (has_one_norm and is_routed)
        )
        self.attn = CausalSelfAttention(config, layer)
        if not has_one_norm:
            self.mlp_norm = make_norm(config, feeds_products=feeds and not is_routed)
        make_mlp = MoE if config.n_expert else MLPS[config.mlp]
        self.mlp = make_mlp(config, layer)
        self.dropout = Dropout(config.dropout)
        if "attn_out_norm" in self.residual.norms:
            self.attn_out_norm = make_norm(config)
            self.mlp_out_norm = make_norm(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        return self.residual.forward(self, x, shared)


class Residual(NamedTuple):
    """How a block adds up its branches."""

    forward: Callable[[Block, Tensor, Shared], Tensor]
    norms: tuple[str, ...] = ("mlp_norm",)
    """Of the block, beside ``attn_norm``."""
    final_norm: bool = True
    """Whether the model has a norm between the last block and the head."""


def _pre(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """The norm comes before each branch, and the stream itself is never normalised (GPT-2)."""
    x = block.dropout.add(x, block.attn(block.attn_norm(x), shared))
    out: Tensor = block.dropout.add(x, block.mlp(block.mlp_norm(x)))
    return out


def _post(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """The stream is normalised after each sum (Vaswani et al., 2017)."""
    x = block.attn_norm(block.dropout.add(x, block.attn(x, shared)))
    out: Tensor = block.mlp_norm(block.dropout.add(x, block.mlp(x)))
    return out


def _deepnorm(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """As ``post``, with the stream times ``alpha = (2 n_layer) ** 1/4`` (arXiv:2203.00555)."""
    x = block.attn_norm(block.dropout.add(block.alpha * x, block.attn(x, shared)))
    out: Tensor = block.mlp_norm(block.dropout.add(block.alpha * x, block.mlp(x)))
    return out


def _sandwich(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """Norms before and after each branch (arXiv:2105.13290, as in Gemma 2)."""
    x = block.dropout.add(x, block.attn_out_norm(block.attn(block.attn_norm(x), shared)))
    out: Tensor = block.dropout.add(x, block.mlp_out_norm(block.mlp(block.mlp_norm(x))))
    return out


def _parallel(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """Both branches read the same stream, each through its own norm (GPT-NeoX)."""
    attended = block.dropout.add(x, block.attn(block.attn_norm(x), shared))
    out: Tensor = block.dropout.add(attended, block.mlp(block.mlp_norm(x)))
    return out


def _parallel_shared(block: Block, x: Tensor, shared: Shared) -> Tensor:
    """Both branches read the same stream through one norm (GPT-J)."""
    normal = block.attn_norm(x)
    attended = block.dropout.add(x, block.attn(normal, shared))
    out: Tensor = block.dropout.add(attended, block.mlp(normal))
    return out


RESIDUALS: dict[NormPlacement, Residual] = {
    "pre": Residual(_pre),
    "post": Residual(_post, final_norm=False),
    "deepnorm": Residual(_deepnorm, final_norm=False),
    "sandwich": Residual(_sandwich, norms=("mlp_norm", "attn_out_norm", "mlp_out_norm")),
    "parallel": Residual(_parallel),
    "parallel_shared": Residual(_parallel_shared, norms=()),
}
"""The configuration's ``norm_placement`` to how a block adds up its branches."""
