"""Softmax attention: the only caller of fused attention.

"Causal" means something else when there are fewer queries than keys: query ``i`` of ``Tq`` sits at
key position ``Tk - Tq + i``, while ``is_causal`` of the fused kernel starts at key 0. Hence the
paths: square causal, one query, a mask; and the plain formula where a CPU trains faster with it.
"""

import contextlib
import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt.model.dropout import dropout as drop

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
) -> Tensor:
    """Softmax attention of ``q`` ``[B, H, Tq, D]`` over ``k`` and ``v`` ``[B, Hkv, Tk, D]``.

    Without ``mask``, either ``Tq == Tk`` (square causal) or ``Tq == 1`` (one query sees every key).
    ``mask``, broadcast over heads, is True where a query may look, or a number that is added to the
    score. ``Hkv`` divides ``H``. ``scale`` multiplies the scores; it is ``1 / sqrt(D)`` unless
    given. Kernels that are for ``training`` alone are taken there alone. Returns ``[B, H, Tq, D]``.
    """
    shape, n_query, n_key = q.shape, q.shape[-2], k.shape[-2]
    assert mask is not None or n_query in (1, n_key), "fewer queries than keys need a mask"
    if mask is None and n_query > 1 and _trains_faster_plainly(q, dropout):
        return _plain(q, k, v, dropout, scale)
    if n_query == 1 and q.shape[1] != k.shape[1]:
        # The queries of a group see the same keys: as rows of one head, they are what every kernel
        # takes. With a mask only some take fewer heads of keys.
        q = q.reshape(shape[0], k.shape[1], -1, shape[3])  # B, Hkv, H / Hkv, D
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
    return y.reshape(shape)


def _kernels(q: Tensor, training: bool) -> contextlib.AbstractContextManager[None]:
    """Which of the fused kernels may be taken: in training, those that the process has chosen."""
    if training or q.device.type != "cuda":
        return contextlib.nullcontext()
    if torch.compiler.is_compiling():  # which knows no locks, and chooses while it traces
        return sdpa_kernel(INFERENCE)
    return _without_cudnn


def _trains_faster_plainly(q: Tensor, dropout: float) -> bool:
    """On a CPU the fused kernel knows no dropout, and its bfloat16 backward pass takes 2 to 4 times
    as long as the plain formula's (benchmarks/RESULTS.md).
    """
    if not (q.requires_grad and q.device.type == "cpu"):
        return False
    return dropout > 0 or (q.dtype == torch.bfloat16 and q.shape[-2] <= PLAIN_UP_TO)


def _plain(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Square causal attention, operation by operation."""
    T, group = q.shape[-2], q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1) + future
    return drop(scores.softmax(dim=-1), dropout) @ v
