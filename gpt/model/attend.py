"""Softmax attention: the model's only call of fused attention.

"Causal" means something else when there are fewer queries than keys: query ``i`` of ``Tq`` sits at
key position ``Tk - Tq + i``, while ``is_causal`` of the fused kernel starts at key 0. Hence the
paths: square causal, one query, a mask; and where a CPU trains faster, this project's own kernels
or the plain formula.
On CUDA, :mod:`gpt.model.flex` computes what is neither fused nor short.
"""

import contextlib
import threading
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt import training_kernels
from gpt.model.dropout import dropout as drop
from gpt.model.flex import attend_in_blocks
from gpt.model.masks import Blocks, as_bias

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PLAIN_UP_TO = 1024
"""Keys. Above, the plain formula's T * T numbers are too many to keep for the backward pass."""
INFERENCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""CUDA's kernels outside of training. torch would try cuDNN's first on newer GPUs: they are planned
anew for each number of keys, that is for each token of a growing cache, and torch's users report
wrong results for few key heads.
"""


class _WithoutCudnn:
    """While anyone is inside, attention on CUDA is not cuDNN's.

    torch has one switch for the whole process: the first who comes in turns it off, and the last
    who leaves turns it back. So a thread that generates never takes cuDNN's kernels, whatever
    others do.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_without_cudnn = _WithoutCudnn()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    training: bool = False,
    blocks: Blocks | None = None,
    to_sinks: tuple[Tensor, Tensor] | None = None,
    softcap: float = 0.0,
    top_k: int = 0,
    learned_sinks: Tensor | None = None,
    flex: "BlockMask | None" = None,
) -> Tensor:
    """Softmax attention of ``q`` ``[B, H, Tq, D]`` over ``k`` and ``v`` ``[B, Hkv, Tk, D]``.

    Without ``mask``, either ``Tq == Tk`` (square causal) or ``Tq == 1`` (one query sees every key).
    ``mask``, broadcast over heads, is True where a query may look, or a number that is added to the
    score. ``Hkv`` divides ``H``. ``scale`` multiplies the scores; it is ``1 / sqrt(D)`` unless
    given. Some kernels are used only in ``training``. Returns ``[B, H, Tq, D]``.

    With ``blocks`` each block of queries reads a few blocks of keys, under its own ``mask``
    ``[N, 1 or H, size, S]``.

    The plain formula computes what fused kernels cannot: ``to_sinks`` are other queries, shaped
    like ``q``, and the keys that they look at (True), broadcastable to the scores. ``softcap``
    bounds the scores, ``top_k`` keeps only the largest ones, and ``learned_sinks`` ``[H]`` are
    scores of keys that have no value. With ``flex``, FlexAttention computes the last and the
    ``softcap``.
    """
    if flex is not None:
        return attend_in_blocks(
            q, k, v, flex, scale=scale, softcap=softcap, learned_sinks=learned_sinks
        )
    if blocks is not None:
        assert mask is not None
        shape = q.shape
        if to_sinks is not None:
            keys = to_sinks[1].repeat(shape[0], 1, 1, 1)
            to_sinks = _split(to_sinks[0], blocks.size).flatten(0, 1), keys
        q, k, v, mask = _by_blocks(q, k, v, mask, blocks)
        y = attend(
            q, k, v, mask=mask, dropout=dropout, scale=scale, training=training,
            to_sinks=to_sinks, softcap=softcap, top_k=top_k, learned_sinks=learned_sinks,
        )  # fmt: skip
        y = y.view(shape[0], -1, *y.shape[1:]).transpose(1, 2).flatten(2, 3)
        return y[:, :, : shape[2]]
    shape, n_query, n_key = q.shape, q.shape[-2], k.shape[-2]
    assert mask is not None or n_query in (1, n_key), "fewer queries than keys need a mask"
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    if softcap or top_k or learned_sinks is not None or to_sinks is not None:
        return _plain(q, k, v, mask, dropout, scale, to_sinks, softcap, top_k, learned_sinks)
    if n_query > 1 and _fused_is_slow(q, dropout):
        if mask is None and _is_for_kernels(q, k, v):
            own = shape[-1] ** -0.5 if scale is None else scale
            return training_kernels.causal_attention(q, k, v, p=dropout, scale=own)
        if dropout > 0 or n_query <= PLAIN_UP_TO:
            return _plain(q, k, v, mask, dropout, scale)
    if n_query == 1 and q.shape[1] != k.shape[1]:
        # The queries of a group see the same keys: as rows of one head, they are what every kernel
        # takes. With a mask only some take fewer heads of keys.
        q = q.reshape(shape[0], k.shape[1], -1, shape[3])  # B, Hkv, H / Hkv, D
        if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:  # a mask for each head
            mask = mask.squeeze(-2).unflatten(-2, (k.shape[1], -1))
    with _kernels(q, training):
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and n_query > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return y.reshape(*shape[:-1], v.shape[-1])


def _kernels(q: Tensor, training: bool) -> contextlib.AbstractContextManager[None]:
    """Which of the fused kernels may be taken: in training, those that the process has chosen."""
    if training or q.device.type != "cuda":
        return contextlib.nullcontext()
    if torch.compiler.is_compiling():  # a lock cannot be traced; the choice is part of the graph
        return sdpa_kernel(INFERENCE)
    return _without_cudnn


def _fused_is_slow(q: Tensor, dropout: float) -> bool:
    """On a CPU the fused kernel has no dropout, and is slow in bfloat16 (benchmarks/RESULTS.md)."""
    is_slow = dropout > 0 or q.dtype == torch.bfloat16
    return is_slow and q.requires_grad and q.device.type == "cpu"


def _is_for_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    is_one_kind = k.shape == v.shape and q.shape[3] == k.shape[3] and q.dtype == k.dtype == v.dtype
    return is_one_kind and training_kernels.takes(q, k, v)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    to_sinks: tuple[Tensor, Tensor] | None = None,
    softcap: float = 0.0,
    top_k: int = 0,
    learned_sinks: Tensor | None = None,
) -> Tensor:
    """Attention operation by operation."""
    T, S, group = q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)
    if to_sinks is not None:
        other, is_sink = to_sinks
        scores = torch.where(is_sink, (other.to(q.dtype) * scale) @ k.transpose(-2, -1), scores)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores + (as_bias(mask, scores.dtype) if mask.dtype == torch.bool else mask)
    elif T > 1:
        scores = scores + torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    if learned_sinks is not None:
        sinks = learned_sinks.to(scores.dtype)[None, :, None, None]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)
    if top_k:
        weights = _best(scores, weights, min(top_k, scores.shape[-1]))
    out: Tensor = drop(weights, dropout)[..., :S] @ v
    return out


def _best(scores: Tensor, weights: Tensor, k: int) -> Tensor:
    """The softmax over the ``k`` largest scores. For ``k`` of 1, where it would be constant, the
    gradient is that of the softmax over all (straight-through, arXiv:1308.3432).
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(k, dim=-1).indices, True)
    kept = scores.masked_fill(~chosen, -torch.inf).softmax(dim=-1)
    if k > 1:
        return kept
    straight: Tensor = weights + (kept - weights).detach()
    return straight


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries ``[B * N, H, size, D]``, and the keys, values and masks that they read."""

    def read(x: Tensor) -> Tensor:  # B * N, heads, sinks + K size, D
        near = _split(x, blocks.size)[:, blocks.numbers.clamp(min=0)].transpose(2, 3).flatten(3, 4)
        first = x[:, None, :, : blocks.sinks].expand(-1, near.shape[1], -1, -1, -1)
        return torch.cat([first, near], dim=3).flatten(0, 1)

    return _split(q, blocks.size).flatten(0, 1), read(k), read(v), mask.repeat(q.shape[0], 1, 1, 1)


def _split(x: Tensor, size: int) -> Tensor:
    """``[B, H, T, D]`` in blocks, padded with zeros, ``[B, N, H, size, D]``."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return padded.view(*x.shape[:2], -1, size, x.shape[3]).transpose(1, 2)
