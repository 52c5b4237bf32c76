"""C++ kernels for training on a CPU: the operations between the matrix products of a block. Each
kernel reads and writes its tensors once, in the forward and in the backward pass.

torch computes a norm, a rotation or dropout with several operators, and each operator reads and
writes the whole activation. Together they took longer than the products (benchmarks/RESULTS.md). A
caller asks :func:`takes` first. If it is false, the caller uses torch's operators, which give the
same result up to rounding. The kernels compute in float32 and round each result once, to the dtype
of the tensors. They have no second derivatives: autograd raises ``RuntimeError`` for them.
"""

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from gpt import cpp_library

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of activations, with their numbers in ``training_kernels.cpp``."""
QUERIES = 256
"""The most queries in a block of causal attention."""
KINDS = (Tensor, nn.Parameter, FakeTensor)
"""The types of tensors that the kernels take. Distributed tensors are not among them."""

_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double


class _Dropout(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("seed", "key", "dropped")),
        ("scale", ctypes.c_float),
    )


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("B", "T", "n_head", "kv_heads", "D", "pairs", "rows")),
        ("cos", _POINTER), ("sin", _POINTER), ("epsilon", _DOUBLE),
    )  # fmt: skip


class _Causal(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("M", "queries", "keys", "length")), ("scale", _DOUBLE),
    )  # fmt: skip


SIGNATURES = {
    "gpt_rms_norm": (_LONG, _LONG, *[_POINTER] * 4, _LONG, _LONG, _DOUBLE),
    "gpt_rms_norm_back": (_LONG, _LONG, *[_POINTER] * 6, _LONG, _LONG),
    "gpt_add_dropped": (_LONG, _LONG, *[_POINTER] * 3, _LONG, _Dropout),
    "gpt_dropped": (_LONG, _LONG, *[_POINTER] * 2, _LONG, _Dropout),
    "gpt_relu_squared": (_LONG, *[_POINTER] * 3, _LONG),
    "gpt_split_heads": (_LONG, ctypes.POINTER(_Heads), *[_POINTER] * 4),
    "gpt_split_heads_back": (_LONG, ctypes.POINTER(_Heads), *[_POINTER] * 5),
    "gpt_causal_softmax": (_LONG, *[_POINTER] * 2, _Causal, _Dropout),
    "gpt_causal_softmax_back": (_LONG, *[_POINTER] * 3, _Causal, _Dropout),
}


def library() -> ctypes.CDLL | None:
    """The compiled functions; ``None`` if they are not available, see :func:`problem`."""
    return _library()[0]


def problem() -> str | None:
    """The reason why there is no :func:`library`, in a sentence."""
    return _library()[1]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    return cpp_library.attempt(load)


def load() -> ctypes.CDLL:
    """The functions of ``training_kernels.cpp``. ``UsageError`` or ``OSError`` if they are not
    there and cannot be compiled.
    """
    lib = cpp_library.load(SOURCE)
    for name, types in SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = types, None
    lib.gpt_threads.restype = _LONG
    return lib


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels can compute with these tensors: float32 or bfloat16 on a CPU, and at
    least one needs a gradient. ``None`` is ignored.
    """
    here = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in here)
        and all(type(t) in KINDS and t.is_cpu and t.dtype in TYPES for t in here)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _run(name: str, *arguments: Any) -> None:
    """Call a function of the library. Tensors are passed as addresses, and dtypes as numbers. With
    fake tensors, which only count memory, nothing is computed.
    """
    lib, known = library(), []
    assert lib is not None, "takes() says whether there are kernels"
    for argument in arguments:
        if isinstance(argument, FakeTensor):
            return
        if isinstance(argument, Tensor):
            assert argument.is_cpu
            assert argument.is_contiguous()
            known.append(argument.data_ptr())
        else:
            known.append(TYPES[argument] if isinstance(argument, torch.dtype) else argument)
    getattr(lib, name)(*known)


def _threads() -> int:
    """The largest number of threads in a call."""
    lib = library()
    assert lib is not None
    n: int = lib.gpt_threads()
    return n


def _drawn(p: float, like: Tensor) -> _Dropout | None:
    """Draw which elements are dropped, with torch's generator; ``None`` if ``p`` is 0."""
    if p == 0:
        return None
    if isinstance(like, FakeTensor):
        return _Dropout()
    seed, key = torch.randint(2**32, (2,), device="cpu").tolist()
    scale = 1 / (1 - p) if p < 1 else 0.0
    return _Dropout(seed, key, min(round(p * 2**32), 2**32 - 1), scale)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, to: torch.dtype) -> Tensor:
        x, rows = x.contiguous(), math.prod(x.shape[:-1])
        own = None if weight is None else weight.float().contiguous()
        y, inverse = torch.empty_like(x, dtype=to), x.new_empty(rows, dtype=torch.float32)
        _run("gpt_rms_norm", x.dtype, to, x, own, y, inverse, rows, x.shape[-1], eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.to = to
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        slope, out = slope.to(ctx.to).contiguous(), torch.empty_like(x)
        own = None if weight is None else weight.float().contiguous()
        sums = None
        if weight is not None and ctx.needs_input_grad[1]:
            sums = torch.zeros(_threads(), x.shape[-1], device="cpu")
        _run(
            "gpt_rms_norm_back", x.dtype, ctx.to, slope, x, own, inverse, out, sums,
            len(inverse), x.shape[-1],
        )  # fmt: skip
        return out, None if sums is None else sums.sum(0).to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, to: torch.dtype) -> Tensor:
    """``x`` ``[..., C]`` over its root mean square, times ``weight`` ``[C]``, in the dtype ``to``
    (arXiv:1910.07467).
    """
    out: Tensor = _RmsNorm.apply(x, weight, eps, to)  # type: ignore[no-untyped-call]
    return out


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, p: float) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        out, ctx.dropout, ctx.dtype = torch.empty_like(x), _drawn(p, x), y.dtype
        _run("gpt_add_dropped", x.dtype, y.dtype, x, y, out, x.numel(), ctx.dropout)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        slope = slope.contiguous()
        of_y = torch.empty_like(slope, dtype=ctx.dtype)
        _run("gpt_dropped", slope.dtype, ctx.dtype, slope, of_y, slope.numel(), ctx.dropout)
        return slope, of_y, None


def add_dropped(x: Tensor, y: Tensor, p: float) -> Tensor:
    """``x + dropout(y, p)`` for ``p > 0``, in the dtype of ``x``. Both have the same shape."""
    out: Tensor = _AddDropped.apply(x, y, p)  # type: ignore[no-untyped-call]
    return out


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _run("gpt_relu_squared", x.dtype, x, None, out, x.numel())
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        slope, out = slope.contiguous(), torch.empty_like(x)
        _run("gpt_relu_squared", x.dtype, x, slope, out, x.numel())
        return out


def relu_squared(x: Tensor) -> Tensor:
    """The square of ReLU (arXiv:2109.08668)."""
    out: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return out


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: _Heads, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.contiguous()
        shapes = [heads.n_head, heads.kv_heads, heads.kv_heads]
        q, k, v = (qkv.new_empty(heads.B, n, heads.T, heads.D) for n in shapes)
        _run("gpt_split_heads", qkv.dtype, heads, qkv, q, k, v)
        ctx.save_for_backward(qkv if heads.epsilon >= 0 else None)
        ctx.heads, ctx.turns, ctx.shape = heads, (cos, sin), qkv.shape
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:
        [qkv] = ctx.saved_tensors
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = q.new_empty(ctx.shape)
        _run("gpt_split_heads_back", q.dtype, ctx.heads, qkv, q, k, v, out)
        return out, None, None, None


def split_heads(
    qkv: Tensor,
    n_head: int,
    kv_heads: int,
    *,
    eps: float | None = None,
    turns: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, T, D]``, keys and values ``[B, Hkv, T, D]`` of ``qkv`` ``[B, T, C]``. With
    ``eps`` each query and key is divided by its root mean square; with ``turns``, cosines and sines
    ``[T, n]`` or ``[B, 1, T, n]``, then rotated (arXiv:2104.09864).
    """
    B, T, C = qkv.shape
    D, pairs, rows = C // (n_head + 2 * kv_heads), 0, T
    cos = sin = None
    if turns is not None:
        pairs = turns[0].shape[-1]
        cos, sin = (turn.float().contiguous() for turn in turns)
        rows = cos.numel() // pairs
        if rows not in (T, B * T) or 2 * pairs > D:
            raise ValueError(f"cosines {[*cos.shape]} are not for {B} x {T} tokens of heads of {D}")
    heads = _Heads(B, T, n_head, kv_heads, D, pairs, rows)
    heads.epsilon = -1.0 if eps is None else eps
    if cos is not None and sin is not None and not isinstance(qkv, FakeTensor):
        heads.cos, heads.sin = cos.data_ptr(), sin.data_ptr()
    out: tuple[Tensor, Tensor, Tensor] = _SplitHeads.apply(qkv, heads, cos, sin)  # type: ignore[no-untyped-call]
    return out


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first query, and the one after the last, of blocks of at most :data:`QUERIES`."""
    n = -(-length // QUERIES)
    return [(length * i // n, length * (i + 1) // n) for i in range(n)]


def _weights(
    q: Tensor, k: Tensor, sizes: _Causal, dropout: _Dropout | None
) -> tuple[Tensor, Tensor]:
    """The weights of a block, ``[M, rows, S]`` for ``q`` ``[M, rows, D]`` and ``k`` ``[M, S, D]``,
    and what dropout leaves of them.
    """
    weights = q @ k.mT
    left = None if dropout is None else torch.empty_like(weights)
    _run("gpt_causal_softmax", weights.dtype, weights, left, sizes, dropout or _Dropout())
    return weights, weights if left is None else left


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, p: float, scale: float) -> Tensor:
        shape, T = q.shape, q.shape[-2]
        k, v = (x.flatten(0, 1).contiguous() for x in (k, v))
        q = q.contiguous().view(len(k), -1, *shape[-2:])  # heads of keys, queries' heads of each
        ctx.dropout, ctx.scale = _drawn(p, q), scale
        y = q.new_empty(*q.shape[:3], v.shape[-1])
        for begin, end in _blocks(T):
            q_rows, y_rows = (x[:, :, begin:end] for x in (q, y))
            sizes = _Causal(q.shape[0] * q.shape[1], end - begin, end, T, scale)
            weights, left = _weights(q_rows.flatten(1, 2), k[:, :end], sizes, ctx.dropout)
            y_rows.copy_((left @ v[:, :end]).view_as(y_rows))
        ctx.save_for_backward(q, k, v, weights)  # those of the last block
        return y.view(*shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape, T = slope.shape, slope.shape[-2]
        of_q, of_k, of_v = torch.empty_like(q), None, None
        slope = slope.contiguous().view(*q.shape[:3], -1)
        dropout = ctx.dropout or _Dropout()
        for begin, end in reversed(_blocks(T)):
            q_rows, slope_rows = (x[:, :, begin:end].flatten(1, 2) for x in (q, slope))
            sizes = _Causal(q.shape[0] * q.shape[1], end - begin, end, T, ctx.scale)
            if end < T:
                weights, _ = _weights(q_rows, k[:, :end], sizes, None)
            scores = slope_rows @ v[:, :end].mT
            left = None if ctx.dropout is None else torch.empty_like(weights)
            _run("gpt_causal_softmax_back", weights.dtype, weights, scores, left, sizes, dropout)
            into = of_q[:, :, begin:end]
            into.copy_((scores @ k[:, :end]).view_as(into))
            of_k = _plus(of_k, scores.mT @ q_rows)
            of_v = _plus(of_v, (weights if left is None else left).mT @ slope_rows)
        assert of_k is not None
        assert of_v is not None
        of_k, of_v = (x.to(q).unflatten(0, (shape[0], -1)) for x in (of_k, of_v))
        return of_q.view(*shape[:3], -1), of_k, of_v, None, None


def _plus(total: Tensor | None, first: Tensor) -> Tensor:
    """``total`` ``[M, T, D]``, in float32, with ``first`` added to its first rows. The first block
    that is added has all rows, and stays as it is if it is the only one.
    """
    if total is None:
        return first
    total = total.float()
    total[:, : first.shape[1]] += first
    return total


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, p: float, scale: float) -> Tensor:
    """Square causal attention of ``q`` ``[B, H, T, D]`` over ``k`` and ``v`` ``[B, Hkv, T, D]``,
    with dropout of its weights. ``Hkv`` divides ``H``.

    Blocks of queries are multiplied with the keys that they may see, and not with those after
    them. The last block's weights are kept for the backward pass, which computes the others again
    (arXiv:2205.14135).
    """
    with torch.autocast("cpu", enabled=False):  # the products have the dtype of q, k and v
        out: Tensor = _CausalAttention.apply(q, k, v, p, scale)  # type: ignore[no-untyped-call]
    return out
