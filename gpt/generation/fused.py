"""A packed model's blocks for one call of the kernels, where nobody changed them.

The kernels have the arithmetic of blocks of some configurations (:func:`gpt.kernels.knows`), as
these are in :mod:`gpt.model`. A block of another class, with another forward, a hook, or other
widths runs matrix by matrix.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpt import kernels
from gpt.config import ModelConfig
from gpt.generation.packed_layers import PackedLinear
from gpt.generation.quantisation import Matrix
from gpt.model.attention import CausalSelfAttention
from gpt.model.block import RESIDUALS, Block
from gpt.model.cache import KVCache
from gpt.model.dropout import Dropout
from gpt.model.gpt import GPT
from gpt.model.masks import MaskRule, blocks
from gpt.model.mlp import ACTIVATIONS, MLP, GatedMLP
from gpt.model.moe import MoE
from gpt.model.norm import LayerNorm, RMSNorm
from gpt.model.position import POSITIONS, RotaryPosition, alibi_slopes
from gpt.model.rotary import frequencies
from gpt.model.store import Ring, Store

FORWARDS = {
    kind: kind.forward
    for kind in (
        Block, CausalSelfAttention, LayerNorm, RMSNorm, MLP, GatedMLP, MoE, Dropout, PackedLinear,
        Matrix, nn.ModuleList,
    )
}  # fmt: skip
"""The modules of a block whose arithmetic the kernels have."""
KNOWN_RESIDUALS, KNOWN_POSITIONS = dict(RESIDUALS), dict(POSITIONS)


class Fused:
    """The blocks of a model and a cache as they are now, for the kernels. Where these do not know
    them, it :attr:`is_known` not.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.rows = cache.max_batch_size
        self._memory = _memory(cache)
        self._blocks: kernels.Blocks | None = None
        if not cache.on_device and kernels.knows(model.config):
            try:
                self._blocks = _gathered(model, cache)
            except ValueError:  # other widths or dtypes, or not in the CPU's memory
                self._blocks = None
        self.is_known = self._blocks is not None

    def is_of(self, cache: KVCache) -> bool:
        """Whether the cache still has the memory that it had."""
        return _memory(cache) == self._memory

    def run(self, x: Tensor, tokens: Sequence[tuple[int, int]]) -> None:
        """As :meth:`gpt.kernels.Blocks.run`."""
        assert self._blocks is not None
        self._blocks.run(x, tokens)


def _memory(cache: KVCache) -> list[tuple[int, torch.Size]]:
    stores = cache.stores.values()
    return [(t.data_ptr(), t.shape) for store in stores for t in store.tensors]


def _gathered(model: GPT, cache: KVCache) -> kernels.Blocks | None:
    config, built = model.config.resolved(), cast("list[Block]", list(model.blocks))
    if not all(_is_as_built(block, config, layer) for layer, block in enumerate(built)):
        return None
    if len(built) != config.n_layer or cache.n_layer < config.n_layer:
        return None
    if type(model.position) is not KNOWN_POSITIONS[config.position]:
        return None
    rotaries = {}
    if isinstance(model.position, RotaryPosition):
        for kind in model.kinds:
            turns, factor = frequencies(config, kind.rotary_base, scaled=kind.rotary_scaled)
            decay, last = model.position.zeta(), kind.last_to_sinks
            rotaries[kind] = kernels.Rotary(turns, factor, decay, last)
    slopes = torch.tensor(alibi_slopes(config.n_head)) if config.position == "alibi" else None
    layers = []
    for layer, block in enumerate(built):
        store, number = cache.layer(layer)
        if store.keys.shape[2::2] != (config.n_kv_head, config.head_dim):
            return None
        keys, values, *scales = (tensor[number] for tensor in store.tensors)
        seen = _seen(store, block.attn.kind.rule)
        memory = kernels.Store(keys, values, scales, **seen)
        rotary = list(rotaries).index(block.attn.kind) if rotaries else -1
        layers.append(_layer(block, config, memory, slopes, rotary))
    return kernels.Blocks(
        layers,
        width=config.n_embd,
        n_head=config.n_head,
        kv_heads=config.n_kv_head,
        head_dim=config.head_dim,
        activation=config.activation,
        parallel=config.norm_placement.startswith("parallel"),
        rotaries=list(rotaries.values()),
    )


def _seen(store: Store, rule: MaskRule) -> dict[str, int]:
    """What queries see of a store, if it is not everything before them."""
    if isinstance(store, Ring):
        return {"window": store.window, "sinks": store.sinks}
    if isinstance(rule, blocks):
        sizes = {"block": rule.size, "local": rule.local}
        return sizes | {"first": rule.first, "random": rule.random}
    return {}


@functools.lru_cache(maxsize=64)
def _built(config: ModelConfig, layer: int) -> dict[str, type[nn.Module]]:
    """The modules of a packed block, by name."""
    with torch.device("meta"):
        block = Block(config, layer)
    packed: dict[str, type[nn.Module]] = {}
    for name, module in block.named_modules():
        packed[name] = PackedLinear if isinstance(module, nn.Linear) else type(module)
        if isinstance(module, nn.Linear):
            packed[f"{name}.matrix"] = Matrix
    return packed


def _is_as_built(block: nn.Module, config: ModelConfig, layer: int) -> bool:
    """Whether nobody changed the block: its modules, their forwards, hooks, and numbers."""
    modules = dict(block.named_modules())
    if {name: type(module) for name, module in modules.items()} != _built(config, layer):
        return False
    for module in modules.values():
        kind = type(module)
        if FORWARDS.get(kind) is not kind.forward or "forward" in vars(module):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    assert isinstance(block, Block)
    attn, residual = block.attn, KNOWN_RESIDUALS[config.norm_placement]
    heads = attn.n_head, attn.n_kv_head, attn.head_dim
    mlps = [module for module in modules.values() if isinstance(module, MLP)]
    return (
        (attn.layer, *heads) == (layer, config.n_head, config.n_kv_head, config.head_dim)
        and block.residual == residual
        and all(mlp.activation == ACTIVATIONS[config.activation] for mlp in mlps)
    )


def _layer(
    block: Block,
    config: ModelConfig,
    memory: kernels.Store,
    slopes: Tensor | None,
    rotary: int,
) -> kernels.Layer:
    attn, mlp = block.attn, block.mlp
    norms: dict[str, Any] = {
        name: _norm(getattr(block, name, None)) for name in kernels.Layer.NORMS[:4]
    }
    experts: dict[str, Any] = {}
    if not isinstance(mlp, MoE):
        experts = {"experts": [_feed_forward(mlp, config)]}
    else:
        every = [*mlp.experts, *mlp.shared]
        experts = {
            "experts": [_feed_forward(expert, config) for expert in every],
            "router": _matrix(mlp.router),
            "preference": mlp.preference,
            "n_expert": config.n_expert,
            "n_active": config.n_expert_active,
            "n_shared": config.moe_shared,
            "by_sigmoid": config.moe_score == "sigmoid",
            "renormalise": config.moe_renormalise,
        }
    return kernels.Layer(
        **norms,
        q_norm=_norm(attn.q_norm),
        k_norm=_norm(attn.k_norm),
        qkv=_matrix(attn.qkv),
        out=_matrix(attn.out),
        **experts,
        n_head=config.n_head,
        scale=attn.scale,
        softcap=attn.softcap,
        top_k=attn.top_k,
        slopes=slopes,
        sinks=attn.sinks,
        rotary=rotary,
        store=memory,
    )


def _feed_forward(mlp: nn.Module, config: ModelConfig) -> kernels.FeedForward:
    gate = _matrix(mlp.gate) if isinstance(mlp, GatedMLP) else None
    return kernels.FeedForward(config.n_embd, _matrix(mlp.up), _matrix(mlp.down), gate)


def _matrix(linear: nn.Module | Tensor) -> kernels.RawMatrix:
    return cast(PackedLinear, linear).described()


def _norm(norm: nn.Module | None) -> kernels.Norm | None:
    if norm is None:
        return None
    assert isinstance(norm, LayerNorm | RMSNorm)
    kind: Any = "layernorm" if isinstance(norm, LayerNorm) else "rmsnorm"
    return kernels.Norm(kind, norm.width, norm.weight, norm.bias, norm.eps)
