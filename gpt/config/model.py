"""The shape of a model."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

from gpt.config.checks import UsageError, check, number

Activation = Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"]
PositionScheme = Literal["learned"]
Norm = Literal["layer"]
NormPlacement = Literal["pre"]
Mlp = Literal["plain"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a :class:`gpt.GPT`. The defaults are GPT-2's smallest model, for ever."""

    vocab_size: int = number(50257, at_least=0)
    """Rows of the token embedding. In a run, 0 takes the tokenizer's (from 1,024 tokens on, padded
    to a multiple of 128 for GPUs), and a larger number pads it."""
    context_length: int = number(1024, at_least=0)
    """The most tokens the model sees at once. In a run with init, 0 keeps the model's own."""
    n_layer: int = number(12, at_least=1)
    """Blocks, each of attention and a feed-forward layer."""
    n_head: int = number(12, at_least=1)
    """Attention heads in a block; they share n_embd."""
    n_kv_head: int = number(0, at_least=0)
    """Heads of keys and values (grouped-query attention); 0: as many as n_head."""
    head_dim: int = number(0, at_least=0)
    """Width of one attention head; 0: n_embd / n_head."""
    n_embd: int = number(768, at_least=1)
    """Width of the residual stream."""
    position: PositionScheme = "learned"
    """How tokens know their positions. learned: an embedding for each."""
    norm: Norm = "layer"
    """layer: LayerNorm."""
    norm_placement: NormPlacement = "pre"
    """pre: before each branch."""
    mlp: Mlp = "plain"
    """plain: up, activation, down."""
    dropout: float = number(0.0, at_least=0, below=1)
    """Probability of dropping an embedding, an attention weight or a residual branch's output."""
    bias: bool = True
    """Biases in the linear layers and the norms."""
    tie_embeddings: bool = True
    """One matrix for the token embedding and the head."""
    norm_eps: float = number(1e-5, above=0)
    """Epsilon of the LayerNorms."""
    n_inner: int = number(0, at_least=0)
    """Width inside the feed-forward layers; 0: four times n_embd."""
    activation: Activation = "gelu_tanh"
    """What the feed-forward layers apply in their middle."""
    scale_attention: bool = True
    """Divide attention scores by the square root of the head's width."""
    scale_attention_by_layer: bool = False
    """Divide attention scores by the number of the layer, from 1, as well."""

    def __post_init__(self) -> None:
        check(self, "model.")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UsageError(
                f"model.n_embd is {self.n_embd}, and must be a multiple of "
                f"model.n_head ({self.n_head})"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise UsageError(
                f"model.n_kv_head is {self.n_kv_head}, and must divide model.n_head ({self.n_head})"
            )

    def resolved(self) -> Self:
        """The same shape with every 0 that stands for another number replaced by that number."""
        return dataclasses.replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            n_inner=self.n_inner or 4 * self.n_embd,
        )
