"""What all layers of one forward share. It is computed once and passed to each block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt.model.cache import KVCache, Plan
from gpt.model.documents import Documents
from gpt.model.kinds import Kind
from gpt.model.masks import Blocks, causal, dense, in_blocks
from gpt.model.store import Slots

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from gpt.model.position import Position
    from gpt.model.rotary import DynamicRotation


class Rotation(NamedTuple):
    """The cosines and sines of each position's angles, ``[T, n]`` or ``[B, 1, T, n]``: the first
    ``2 n`` numbers of a head are rotated, number ``i`` with number ``n + i``.
    """

    cos: Tensor
    sin: Tensor
    decay: Tensor | None = None
    """xPos: what queries are multiplied by, and keys divided by, ``[T, n]`` or ``[B, 1, T, n]``."""

    def query(self, q: Tensor) -> Tensor:
        """Queries ``[B, H, T, D]``, rotated (arXiv:2104.09864)."""
        return self._turn(q, self.decay)

    def key(self, k: Tensor) -> Tensor:
        """Keys ``[B, H, T, D]``, rotated."""
        return self._turn(k, None if self.decay is None else 1 / self.decay)

    def _turn(self, x: Tensor, factor: Tensor | None) -> Tensor:
        n = self.cos.shape[-1]
        cos, sin = self.cos, self.sin
        if factor is not None:
            cos, sin = cos * factor, sin * factor
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second, rest = x.split((n, n, x.shape[-1] - 2 * n), dim=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


class Sinks(NamedTuple):
    """How queries that are far from the sinks look at them."""

    rotation: Rotation
    """The rotation of queries towards sinks."""
    keys: Tensor
    """Which keys are sinks, broadcastable to ``[B, H, T, S]``."""


class View(NamedTuple):
    """What the layers of one kind share."""

    mask: Tensor | None
    """The number that is added to the scores, broadcastable to ``[B, H, T, S]``; ``None`` where
    attention is square causal, or has one query for each row that sees every key. With ``blocks``
    the mask of each block, ``[N, 1 or H, size, S]``.
    """
    rotation: Rotation | None
    """By what queries and keys are rotated; ``None`` where they are not."""
    dynamic: "DynamicRotation | None" = None
    """By what queries and keys are rotated when they meet."""
    sinks: Sinks | None = None
    """Where positions are rotated and queries are beyond the window from the sinks."""
    blocks: Blocks | None = None
    """How attention that sees little of a long context is computed, without a cache."""
    flex: "BlockMask | None" = None
    """Instead of a mask, where FlexAttention computes attention."""
    lengths: Tensor | None = None
    """Of the documents, where attention is computed one by one; the mask is the longest one's."""


def view(
    position: "Position",
    kind: Kind,
    at: Tensor,
    slots: Slots,
    *,
    end: int,
    dtype: torch.dtype,
    flex: "BlockMask | None" = None,
    documents: Documents | None = None,
) -> View:
    """What the layers of a kind share, for queries at the positions ``at`` ``[..., T]``, all below
    ``end``, and keys in ``slots``. Attention computes its scores in ``dtype``, most of the time.

    With ``flex``, FlexAttention computes it. Else attention needs no mask if it is square causal,
    or if each query sees every key. Of tokens alone, a rule that sees little is computed by blocks.
    Else there is a mask. Where ``documents`` are computed one by one, the mask is that of the
    longest one alone.
    """
    T, keys, blocks = at.shape[-1], slots.keys, None
    rotation = position.rotation(at, kind)
    if flex is not None:
        return View(None, rotation, flex=flex)
    dynamic = position.dynamic(at, keys, kind)
    if documents is not None and documents.lengths is not None and dynamic is None:
        return _one_by_one(position, kind, rotation, documents, dtype=dtype)
    if slots.is_square:
        sees_all = kind.rule is causal or (kind.window is not None and kind.window >= T)
        blocks = in_blocks(kind.rule, T, at.device) if dynamic is None else None
    else:
        sees_all = kind.rule is causal and slots.sees_all
    queries = at if blocks is None else blocks.at
    keys = keys if blocks is None else blocks.positions
    bias = position.bias(queries, keys, kind)
    if sees_all and bias is None and (dynamic is None or dynamic.is_one):
        return View(None, rotation, dynamic)
    same = None if documents is None else documents.same()
    mask = dense(kind.rule, queries, keys, dtype, same=same)
    mask = mask if bias is None else (mask + bias).to(mask.dtype)
    last, sinks = kind.last_to_sinks, None
    if rotation is not None and last is not None and end > last + 1:
        near = position.rotation(at.clamp(max=last), kind)
        assert near is not None
        is_sink = (keys >= 0) & (keys < kind.sinks)
        sinks = Sinks(near, is_sink if is_sink.ndim == 1 else is_sink[:, None, None])
    return View(mask, rotation, dynamic, sinks, blocks)


def _one_by_one(
    position: "Position",
    kind: Kind,
    rotation: Rotation | None,
    documents: Documents,
    *,
    dtype: torch.dtype,
) -> View:
    """The mask and the sinks of the longest document alone, which begin with those of each other
    one, and the rotation of all.
    """
    n = documents.longest
    first = torch.arange(n, device=documents.at.device)
    slots = Slots(first, is_square=False, sees_all=True, to=slice(0, n))
    alone = view(position, kind, first, slots, end=n, dtype=dtype)
    sinks = alone.sinks
    if sinks is not None:
        near = position.rotation(documents.at.clamp(max=kind.last_to_sinks), kind)
        assert near is not None
        sinks = Sinks(near, sinks.keys)
    return View(alone.mask, rotation, None, sinks, lengths=documents.lengths)


@dataclass
class Shared:
    """Positions, masks and cache of one forward of ``T`` tokens."""

    at: Tensor
    """The position of each token: ``[T]``, or ``[B, T]`` where rows differ: in their lengths, or in
    their documents.
    """
    views: Mapping[Kind, View]
    cache: KVCache | None = None
    plan: Plan | None = None
    """Where the tokens go in the cache."""
    documents: Documents | None = None
    """Where rows hold several."""
    tokens: Tensor | None = None
    """``[B, T]``, for layers with value embeddings."""
