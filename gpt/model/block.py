"""One block: attention, then the feed-forward layer, each added to the stream that it reads."""

from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.attention import CausalSelfAttention
from gpt.model.cache import KVCache
from gpt.model.dropout import Dropout
from gpt.model.mlp import MLP


class Block(nn.Module):
    """A pre-norm residual block, as in GPT-2 (Radford et al., 2019)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        x = x + self.dropout(self.attn(self.attn_norm(x), mask=mask, cache=cache))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x
