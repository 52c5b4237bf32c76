"""C++ kernels for decoding on a CPU: products of a few rows with a matrix that is read once, and
whole blocks for a few tokens.

The library (:mod:`gpt.cpp_library`) works on raw memory, which this module checks, and shares
torch's threads (OpenMP). Without a compiler, :func:`library` is ``None``, :func:`problem` gives the
reason, and callers use torch's operators.
"""

import ctypes
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gpt import cpp_library
from gpt.config import Activation, ModelConfig
from gpt.config import Norm as NormName

SOURCE = Path(__file__).with_suffix(".cpp")
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "int8_gguf": 4, "int4_gguf": 5}
"""The formats of a matrix, with their numbers in ``kernels.cpp``."""
GROUP = 32
"""Weights of a row that have one scale in the formats whose scales are by groups."""


class Packed(NamedTuple):
    """The tensors of a format of few bits, in rows of K weights."""

    bits: int
    """Of a weight."""
    multiple: int
    """Rows are padded to a multiple of this many weights."""
    scales: torch.dtype
    has_groups: bool
    """Whether each :data:`GROUP` has a scale; else, each row has one."""
    has_lows: bool
    """Whether each group has an offset too, in the dtype of the scales."""

    def padded(self, width: int) -> int:
        """The weights of a row of K = ``width``, with the padding."""
        return -(-width // self.multiple) * self.multiple

    def row_bytes(self, width: int) -> int:
        """The bytes of a row's weights, without scales and offsets."""
        return self.padded(width) * self.bits // 8

    def row_scales(self, width: int) -> tuple[int, ...]:
        """The shape of a row's scales: one number, or ``[groups]``."""
        return (self.padded(width) // GROUP,) if self.has_groups else ()


PACKED = {
    "int8": Packed(8, 128, torch.float32, has_groups=False, has_lows=False),
    "int4": Packed(4, 128, torch.bfloat16, has_groups=True, has_lows=True),
    "int8_gguf": Packed(8, 32, torch.float16, has_groups=True, has_lows=False),
    "int4_gguf": Packed(4, 32, torch.float16, has_groups=True, has_lows=True),
}
"""The formats of integers; :mod:`gpt.generation.quantisation` describes their memory layouts."""


def _any(value: Any) -> bool:
    return True


ACTIVATIONS: dict[Activation, int] = {
    "gelu_tanh": 0, "gelu": 1, "relu": 2, "silu": 3, "tanh": 4, "relu_squared": 5,
}  # fmt: skip

KNOWN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("vocab_size", "context_length", "n_layer", "n_embd", "n_inner"), _any),
    **dict.fromkeys(("n_head", "n_kv_head", "head_dim", "bias", "qkv_bias", "qk_norm"), _any),
    **dict.fromkeys(("mlp_bias", "scale_attention_width", "rotary_scaling_local"), _any),
    **dict.fromkeys(("scale_attention", "scale_attention_by_layer", "attention_softcap"), _any),
    **dict.fromkeys(("window", "sinks", "learned_sinks", "attention_top_k"), _any),
    **dict.fromkeys(("rotary_base", "rotary_base_local", "rotary_fraction"), _any),
    **dict.fromkeys(("rotary_scaling_factor", "rotary_trained_length"), _any),
    **dict.fromkeys(("rotary_low_frequency", "rotary_high_frequency", "rotary_temperature"), _any),
    **dict.fromkeys(("norm_weight", "norm_bias", "norm_eps"), _any),
    **dict.fromkeys(("n_expert", "n_expert_active", "moe_shared", "moe_renormalise"), _any),
    # used only outside the blocks, in training, or in sparse layers
    **dict.fromkeys(("tie_embeddings", "scale_embeddings", "embedding_norm"), _any),
    **dict.fromkeys(("logit_softcap", "logit_softcap_form", "dropout", "initial"), _any),
    **dict.fromkeys(("moe_capacity", "moe_balance", "moe_balance_weight", "moe_z_weight"), _any),
    **dict.fromkeys(("sparse_block", "sparse_local", "sparse_global", "sparse_random"), _any),
    "activation": ACTIVATIONS.__contains__,
    "position": ("learned", "sinusoidal", "rotary", "xpos", "alibi", "none").__contains__,
    "rotary_scaling": ("none", "linear", "ntk", "yarn", "llama3").__contains__,
    "norm": ("layernorm", "rmsnorm").__contains__,
    "norm_placement": ("pre", "sandwich", "parallel", "parallel_shared").__contains__,
    "mlp": ("plain", "gated").__contains__,
    "moe_score": ("softmax", "sigmoid").__contains__,
    "window_pattern": lambda pattern: not set(pattern) - {"G", "L", "S"},
    "copy": ("none", "pointer").__contains__,
    # these run matrix by matrix
    "value_embeddings": lambda every: every == 0,
    **dict.fromkeys(("skip_embedding", "skip_layers"), operator.not_),
}
"""Each field of a model's configuration that the kernels of whole blocks handle, and which values
of it. A model with a field that is not here runs matrix by matrix.
"""

_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double


def knows(config: ModelConfig) -> bool:
    """Whether :class:`Blocks` have the arithmetic of such a model."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    known = all(name in KNOWN and KNOWN[name](value) for name, value in values.items())
    return known and config.resolved().head_dim % 16 == 0


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
    """The functions of ``kernels.cpp``. ``UsageError`` or ``OSError`` if they are not there and
    cannot be compiled.
    """
    lib = cpp_library.load(SOURCE)
    lib.gpt_linear.argtypes = [ctypes.POINTER(RawMatrix), _LONG, _POINTER, _POINTER]
    lib.gpt_dense.argtypes = [ctypes.POINTER(RawMatrix), _LONG, _POINTER]
    structures = [ctypes.POINTER(kind) for kind in (Layer, _Shape, _LONG)]
    lib.gpt_blocks.argtypes = [*structures, _LONG, _POINTER]
    for function in (lib.gpt_linear, lib.gpt_dense, lib.gpt_blocks):
        function.restype = None
    return lib


def _address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int:
    """The tensor's address; ``ValueError`` unless it is contiguous on the CPU in this dtype."""
    if (
        tensor is None
        or tensor.dtype != dtype
        or tensor.shape != shape
        or not tensor.is_cpu
        or not tensor.is_contiguous()
    ):
        has = "nothing" if tensor is None else f"{tensor.dtype} {[*tensor.shape]} {tensor.device}"
        raise ValueError(f"the kernels take {dtype} {[*shape]} on the CPU, not {has}")
    return tensor.data_ptr()


class RawMatrix(ctypes.Structure):
    """A matrix ``[N, K]`` as ``kernels.cpp`` reads it. It keeps its tensors alive.

    ``kind`` is one of :data:`FORMATS`; :mod:`gpt.generation.quantisation` describes their memory
    layouts. ``ValueError`` for another format, and for tensors with another layout or on another
    device.
    """

    _fields_ = (
        *((name, _LONG) for name in ("kind", "N", "K")),
        *((name, _POINTER) for name in ("weights", "scales", "lows", "bias")),
    )

    def __init__(
        self,
        kind: str,
        width: int,
        weights: Tensor,
        scales: Tensor | None,
        lows: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        N = len(weights)
        scale = low = None
        if kind not in FORMATS:
            raise ValueError(f"the kernels do not take matrices of {kind}")
        if packed := PACKED.get(kind):
            data = _address(weights, torch.uint8, N, packed.row_bytes(width))
            shape = N, *packed.row_scales(width)
            scale = _address(scales, packed.scales, *shape)
            low = _address(lows, packed.scales, *shape) if packed.has_lows else None
        else:
            data = _address(weights, getattr(torch, kind), N, width)
        added = None if bias is None else _address(bias, torch.float32, N)
        super().__init__(FORMATS[kind], N, width, data, scale, low, added)
        self.tensors = weights, scales, lows, bias


def linear(x: Tensor, matrix: RawMatrix) -> Tensor:
    """``x`` ``[..., K]`` of float32 times the matrix, plus its bias: ``[..., N]``. The matrix is
    read from memory once.
    """
    lib = library()
    assert lib is not None
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[-1] != matrix.K:
        raise ValueError(
            f"the product takes float32 of {matrix.K} numbers on the CPU, not {x.dtype} of "
            f"{x.shape[-1]} on {x.device}"
        )
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], matrix.N)
    lib.gpt_linear(matrix, x.numel() // matrix.K, x.data_ptr(), y.data_ptr())
    return y


def dense(matrix: RawMatrix, dtype: torch.dtype) -> Tensor:
    """Convert a matrix of integers to ``[N, K]`` of float32 or bfloat16."""
    lib = library()
    assert lib is not None
    is_packed = matrix.kind in [FORMATS[kind] for kind in PACKED]
    if not is_packed or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"int8 and int4 are converted to float32 or bfloat16, not to {dtype}")
    out = torch.empty(matrix.N, matrix.K, dtype=dtype, device="cpu")
    lib.gpt_dense(matrix, dtype == torch.bfloat16, out.data_ptr())
    return out


def _numbers(tensor: Tensor | None, *shape: int) -> int | None:
    """The address of a float32 tensor; ``None`` without a tensor."""
    return None if tensor is None else _address(tensor, torch.float32, *shape)


class Norm(ctypes.Structure):
    """A norm's weight and bias, float32 ``[width]`` or ``None``. It keeps them alive."""

    KINDS: ClassVar[dict[NormName, int]] = {"layernorm": 1, "rmsnorm": 2}
    _fields_ = (
        ("kind", _LONG), ("weight", _POINTER), ("bias", _POINTER), ("epsilon", _DOUBLE),
    )  # fmt: skip

    def __init__(
        self, kind: NormName, width: int, weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> None:
        addresses = _numbers(weight, width), _numbers(bias, width)
        super().__init__(self.KINDS[kind], *addresses, epsilon)
        self.tensors = weight, bias


class FeedForward(ctypes.Structure):
    """A feed-forward layer for ``width`` channels, with or without a gate."""

    _fields_ = tuple((name, RawMatrix) for name in ("up", "gate", "down"))

    def __init__(
        self, width: int, up: RawMatrix, down: RawMatrix, gate: RawMatrix | None = None
    ) -> None:
        shapes = [(up.N, up.K), (down.K, down.N)] + ([] if gate is None else [(gate.N, gate.K)])
        if set(shapes) != {(up.N, width)}:
            raise ValueError(f"the matrices of a feed-forward layer do not fit the width {width}")
        super().__init__(up=up, down=down, **({} if gate is None else {"gate": gate}))
        self.parts = up, gate, down


class Rotary(ctypes.Structure):
    """The rotation of queries and keys: ``turns`` ``[n]`` in radians per position, the ``factor``
    of cosines and sines, xPos's ``decay`` ``[n]``, and ``last``, the highest position to which a
    query is rotated when it reads sinks.
    """

    _fields_ = (
        ("pairs", _LONG), ("last", _LONG), ("turns", _POINTER), ("decay", _POINTER),
        ("factor", _DOUBLE),
    )  # fmt: skip

    def __init__(
        self, turns: Tensor, factor: float, decay: Tensor | None, last: int | None = None
    ) -> None:
        n = len(turns)
        last = -1 if last is None else last
        super().__init__(n, last, _numbers(turns, n), _numbers(decay, n), factor)
        self.tensors = turns, decay


class Store(ctypes.Structure):
    """The keys and values of one layer, ``[B, Hkv, S, D]``, float32 or bfloat16, or int8 with
    ``scales`` ``[B, Hkv, S, 1]`` of keys and of values. It keeps its tensors alive. With an
    attention ``window``, the slots after the first ``sinks`` are a ring. With a ``block`` size,
    queries see the ``local`` newest blocks, the ``first`` blocks, and ``random`` drawn ones.
    """

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values", "key_scales", "value_scales")),
        *((n, _LONG) for n in ("row_stride", "head_stride", "slots", "window", "sinks")),
        *((n, _LONG) for n in ("block", "local", "first", "random")),
    )

    NUMBERS: ClassVar[dict[torch.dtype, int]] = {
        torch.float32: 0, torch.bfloat16: 1, torch.int8: 2,
    }  # fmt: skip

    def __init__(
        self, keys: Tensor, values: Tensor, scales: Sequence[Tensor] = (), **seen: int
    ) -> None:
        dtype = keys.dtype
        if dtype not in self.NUMBERS or len(scales) != (2 if dtype == torch.int8 else 0):
            raise ValueError(f"the kernels do not take caches of {dtype}")
        self.numbers = self.NUMBERS[dtype]
        addresses = [_address(tensor, dtype, *keys.shape) for tensor in (keys, values)]
        addresses += [_numbers(tensor, *keys.shape[:3], 1) or 0 for tensor in scales] or [0, 0]
        super().__init__(*addresses, *keys.stride()[:2], keys.shape[2], **seen)
        self.tensors = keys, values, *scales


class Layer(ctypes.Structure):
    """One block and its part of the cache. Parts are optional: without a norm, its input passes
    unchanged; without an attention window, attention sees all earlier tokens; without a router,
    the block has one expert.
    """

    NORMS = ("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm", "q_norm", "k_norm")
    _fields_ = (
        *((name, Norm) for name in NORMS),
        *((name, RawMatrix) for name in ("qkv", "out")),
        ("experts", ctypes.POINTER(FeedForward)),
        ("router", RawMatrix),
        ("preference", _POINTER),
        *((name, _LONG) for name in ("n_expert", "n_active", "n_shared")),
        *((name, _LONG) for name in ("by_sigmoid", "renormalise")),
        *((name, _DOUBLE) for name in ("scale", "softcap")),
        *((name, _POINTER) for name in ("slopes", "sinks")),
        *((name, _LONG) for name in ("rotary", "top_k")),
        ("store", Store),
    )

    def __init__(
        self,
        *,
        experts: Sequence[FeedForward],
        n_head: int,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        preference: Tensor | None = None,
        rotary: int = -1,
        **given: Any,
    ) -> None:
        """``given`` has the other fields by name; ``None`` for a part that the block lacks."""
        given = {name: part for name, part in given.items() if part is not None}
        array = (FeedForward * len(experts))(*experts)
        super().__init__(
            experts=array,
            slopes=_numbers(slopes, n_head),
            sinks=_numbers(sinks, n_head),
            preference=_numbers(preference, given.get("n_expert", 0)),
            rotary=rotary,
            **given,
        )
        self.kept = given, array, list(experts), slopes, sinks, preference


class _Shape(ctypes.Structure):
    _fields_ = (
        *((n, _LONG) for n in ("n_layer", "n_head", "kv_heads", "head_dim", "activation")),
        *((n, _LONG) for n in ("parallel", "numbers", "n_rotary")),
        ("rotaries", ctypes.POINTER(Rotary)),
    )


class Blocks:
    """Blocks and their cache for ``kernels.cpp``. ``ValueError`` if their widths do not match. They
    keep their tensors alive.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        width: int,
        n_head: int,
        kv_heads: int,
        head_dim: int,
        activation: Activation,
        parallel: bool = False,
        rotaries: Sequence[Rotary] = (),
    ) -> None:
        self.layers, self.width = layers, width
        heads, qkv = n_head * head_dim, (n_head + 2 * kv_heads) * head_dim
        for layer in layers:
            shapes = [(m.N, m.K) for m in (layer.qkv, layer.out)]
            if shapes != [(qkv, width), (width, heads)]:
                raise ValueError(f"the blocks' matrices do not fit the width {width}")
            router = layer.router.N, layer.router.K
            if layer.n_expert and router != (layer.n_expert, width):
                raise ValueError(f"a router does not fit {layer.n_expert} experts")
        if not layers or head_dim % 16 or n_head % kv_heads:
            raise ValueError(f"the size of a head must be a multiple of 16, not {head_dim}")
        if any(2 * rotary.pairs > head_dim for rotary in rotaries):
            raise ValueError(f"a rotation has more than the {head_dim} numbers of a head")
        numbers: set[int] = {layer.kept[0]["store"].numbers for layer in layers}
        if len(numbers) > 1:
            raise ValueError("the layers' caches have different dtypes")
        self._array = (Layer * len(layers))(*layers)
        self._rotaries = (Rotary * len(rotaries))(*rotaries)
        self._shape = _Shape(
            len(layers), n_head, kv_heads, head_dim, ACTIVATIONS[activation],
            parallel, numbers.pop(), len(rotaries), self._rotaries,
        )  # fmt: skip
        self._kept = list(rotaries)

    def run(self, x: Tensor, tokens: Sequence[tuple[int, int]]) -> None:
        """Apply the blocks to a few new tokens, in-place: ``x`` ``[M, C]`` of float32. ``tokens``
        has each token's row of the cache and its position in it. The cache must have these rows
        and positions; the call writes the tokens' keys and values to it.
        """
        lib = library()
        assert lib is not None
        numbers = [number for token in tokens for number in token]
        array = (_LONG * len(numbers))(*numbers)
        address = _address(x, torch.float32, len(tokens), self.width)
        lib.gpt_blocks(self._array, self._shape, array, len(tokens), address)
