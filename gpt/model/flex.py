"""FlexAttention (arXiv:2412.05496): a fused kernel that torch generates for changed scores.

On CUDA it computes what fused attention cannot, soft-capped scores, learned sinks and several
documents in a row, without the ``T * T`` numbers of the plain formula or a mask. No test has run it
with documents on a GPU.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt.config import ModelConfig
from gpt.model.kinds import Kind
from gpt.model.masks import MaskRule, causal, window

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FEWEST = 128
"""Tokens. For fewer, the plain formula is as good."""


def serves(
    config: ModelConfig, kind: Kind, at: Tensor, *, training: bool, documents: bool = False
) -> bool:
    """Whether these layers need it, and it can compute their attention over the tokens at the
    positions ``at`` ``[T]`` alone, or ``[B, T]`` of several ``documents`` in a row.
    """
    needed = config.attention_softcap > 0 or config.learned_sinks or documents
    other = config.attention_top_k or kind.sinks or (training and config.dropout)
    width = config.head_dim or config.n_embd // config.n_head
    return (
        bool(needed and not other)
        and (kind.rule is causal or isinstance(kind.rule, window))
        and config.position != "alibi"
        and config.rotary_scaling != "dynamic_ntk"
        and width >= 16
        and at.shape[-1] >= FEWEST
        and at.device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
    )


@functools.lru_cache(maxsize=16)
def block_mask(rule: MaskRule, n_token: int, device: torch.device) -> "BlockMask":
    """A rule for ``n_token`` tokens alone, with the blocks of 128 that it hides or shows whole."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(query, key)

    return create_block_mask(sees, None, None, n_token, n_token, device=device)


def block_mask_of_documents(rule: MaskRule, number: Tensor) -> "BlockMask":
    """A rule inside documents, which have the ``number`` ``[B, T]`` at each token. Blocks of keys
    that belong to other documents are not read. The rule must depend on distances alone.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(query, key) & (number[batch, query] == number[batch, key])

    B, T = number.shape
    on_gpu = number.device.type == "cuda"  # compiled, it needs no B * T * T numbers
    return create_block_mask(sees, B, None, T, T, device=number.device, _compile=on_gpu)


def attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: "BlockMask",
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    learned_sinks: Tensor | None = None,
) -> Tensor:
    """As :func:`gpt.model.attend.attend`. A learned sink ``s`` enlarges the sum of the softmax,
    whose logarithm is ``lse``, so its output is multiplied by ``sigmoid(lse - s)``.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    y, sums = _kernel()(
        q,
        k,
        v,
        score_mod=capped if softcap else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    out: Tensor = y
    if learned_sinks is not None:
        kept = torch.sigmoid(sums.lse - learned_sinks.to(sums.lse.dtype)[:, None])
        out = out * kept[..., None].to(out.dtype)
    return out


@functools.cache
def _kernel() -> Callable[..., Any]:
    """The compiled function, which is one for all layers and shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
