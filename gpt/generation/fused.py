"""A packed model's blocks for one call of the kernels, where nobody changed them.

The kernels have the arithmetic of blocks of some configurations (:func:`gpt.kernels.knows`), as
these are in :mod:`gpt.model`. A block of another class, with another forward, a hook, or other
widths runs matrix by matrix.
"""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from gpt import kernels
from gpt.config import ModelConfig
from gpt.generation.packed_layers import PackedLinear
from gpt.generation.quantisation import Matrix
from gpt.model.attention import CausalSelfAttention
from gpt.model.block import Block, pre_norm
from gpt.model.cache import KVCache
from gpt.model.dropout import Dropout
from gpt.model.mlp import ACTIVATIONS, MLP
from gpt.model.norm import LayerNorm

BUILT: dict[str, type[nn.Module]] = {
    "": Block,
    "attn_norm": LayerNorm,
    "attn": CausalSelfAttention,
    "attn.qkv": PackedLinear,
    "attn.qkv.matrix": Matrix,
    "attn.out": PackedLinear,
    "attn.out.matrix": Matrix,
    "mlp_norm": LayerNorm,
    "mlp": MLP,
    "mlp.up": PackedLinear,
    "mlp.up.matrix": Matrix,
    "mlp.down": PackedLinear,
    "mlp.down.matrix": Matrix,
    "dropout": Dropout,
}
"""The modules of a block whose arithmetic the kernels have."""
FORWARDS = {kind: kind.forward for kind in BUILT.values()}


class Fused:
    """Blocks and a cache as they are now, for the kernels. Where these do not know them, it
    :attr:`is_known` not.
    """

    def __init__(self, blocks: Iterable[nn.Module], config: ModelConfig, cache: KVCache) -> None:
        config = config.resolved()
        self.keys, self.values, self.rows = cache.keys, cache.values, cache.max_batch_size
        fits = (*cache.keys.shape[2::2], cache.values.shape) == (
            config.n_kv_head, config.head_dim, cache.keys.shape,
        )  # fmt: skip
        self._blocks: kernels.Blocks | None = None
        if not cache.on_device and fits and kernels.knows(config):
            try:
                self._blocks = _gathered(list(blocks), config)
                self._memory = kernels.Cache(cache.keys, cache.values)
            except ValueError:  # other widths or dtypes, or not in the CPU's memory
                self._blocks = None
        self.is_known = self._blocks is not None and len(self._blocks.layers) <= len(cache.keys)

    def is_of(self, cache: KVCache) -> bool:
        """Whether the cache still has the memory that it had."""
        return cache.keys is self.keys and cache.values is self.values

    def run(self, x: Tensor, places: Sequence[tuple[int, int]]) -> None:
        """As :meth:`gpt.kernels.Blocks.run`."""
        assert self._blocks is not None
        self._blocks.run(x, self._memory, places)


def _gathered(blocks: list[nn.Module], config: ModelConfig) -> kernels.Blocks | None:
    if not all(_is_as_built(block, config, layer) for layer, block in enumerate(blocks)):
        return None
    return kernels.Blocks(
        [_layer(cast(Block, block)) for block in blocks],
        n_head=config.n_head,
        kv_heads=config.n_kv_head,
        head_dim=config.head_dim,
        activation=config.activation,
    )


def _is_as_built(block: nn.Module, config: ModelConfig, layer: int) -> bool:
    """Whether nobody changed the block: its modules, their forwards, hooks, and numbers."""
    modules = dict(block.named_modules())
    if {name: type(module) for name, module in modules.items()} != BUILT:
        return False
    for kind, module in zip(BUILT.values(), modules.values(), strict=True):
        if kind.forward is not FORWARDS[kind] or "forward" in vars(module):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    attn, mlp = cast(CausalSelfAttention, block.attn), cast(MLP, block.mlp)
    heads = attn.n_head, attn.n_kv_head, attn.head_dim
    return (
        (attn.layer, *heads) == (layer, config.n_head, config.n_kv_head, config.head_dim)
        and vars(block)["residual"] is pre_norm
        and mlp.activation == ACTIVATIONS[config.activation]
    )  # fmt: skip


def _layer(block: Block) -> kernels.Layer:
    attn, mlp = block.attn, block.mlp
    norms = _norm(cast(LayerNorm, block.attn_norm)), _norm(cast(LayerNorm, block.mlp_norm))
    linears = [cast(PackedLinear, part) for part in (attn.qkv, attn.out, mlp.up, mlp.down)]
    qkv, out, up, down = (linear.described() for linear in linears)
    return kernels.Layer(*norms, qkv, out, up, down, attn.scale)


def _norm(norm: LayerNorm) -> kernels.Norm:
    return kernels.Norm(norm.weight, norm.bias, norm.eps)
