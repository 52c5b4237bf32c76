"""What decoding on a CPU spends its time on, in C++: products of a few rows with a matrix that is
read once, and GPT-2's blocks for a few tokens.

``kernels.cpp`` is compiled for this machine at its first use, in two seconds, with the C++ compiler
that is there (``CXX``, or c++), and kept in the user's cache folder. It works on raw memory and
shares torch's threads (OpenMP). Where there is no compiler, :func:`library` is ``None``,
:func:`problem` says why, and callers use torch's own operators.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpt.config import Activation, UsageError
from gpt.device import cpu_limit

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    # Not -ffast-math: what is not a number stays so, and sums have one order whatever the rows.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
TARGETS = {None: "native", "avx2": "x86-64-v3", "default": "x86-64"}
"""The compiler's ``-march`` for each :func:`gpt.device.cpu_limit`, on x86."""
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
"""Of a matrix: the number that ``kernels.cpp`` knows each by."""

ACTIVATIONS: dict[Activation, int] = {"gelu_tanh": 0, "gelu": 1, "relu": 2, "silu": 3, "tanh": 4}

_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; ``None`` where they cannot be had: see :func:`problem`."""
    try:
        lib = ctypes.CDLL(str(_compiled()))
    except (UsageError, OSError):
        return None
    lib.gpt_linear.argtypes = [ctypes.POINTER(Matrix), _LONG, _POINTER, _POINTER]
    lib.gpt_dense.argtypes = [ctypes.POINTER(Matrix), _LONG, _POINTER]
    structures = [ctypes.POINTER(kind) for kind in (Layer, Shape, Cache)]
    lib.gpt_blocks.argtypes = [*structures, ctypes.POINTER(_LONG), _LONG, _POINTER]
    for function in (lib.gpt_linear, lib.gpt_dense, lib.gpt_blocks):
        function.restype = None
    return lib


def problem() -> str | None:
    """Why there is no :func:`library`, in a sentence."""
    try:
        ctypes.CDLL(str(_compiled()))
    except (UsageError, OSError) as error:
        return str(error)
    return None


class Matrix(ctypes.Structure):
    """A matrix ``[N, K]`` as ``kernels.cpp`` sees it; it does not keep the tensors alive.

    ``kind`` is one of :data:`FORMATS`; :mod:`gpt.generation.inference` says how each lies in
    memory.
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
        tensors = (weights, scales, lows, bias)
        assert all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in tensors)
        assert bias is None or bias.dtype == torch.float32
        places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        super().__init__(FORMATS[kind], len(weights), width, *places)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """``x`` ``[..., K]`` of float32 times the matrix, plus its bias: ``[..., N]``. The matrix is
    read from memory once.
    """
    lib = library()
    assert lib is not None
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[-1] != matrix.K:
        raise ValueError(
            f"the product takes float32 of {matrix.K} numbers on the CPU, and not {x.dtype} of "
            f"{x.shape[-1]} on {x.device}"
        )
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], matrix.N)
    lib.gpt_linear(matrix, x.numel() // matrix.K, x.data_ptr(), y.data_ptr())
    return y


def dense(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix of int8 or int4 as ``[N, K]`` of float32 or bfloat16."""
    lib = library()
    assert lib is not None
    out = torch.empty(matrix.N, matrix.K, dtype=dtype)
    lib.gpt_dense(matrix, dtype == torch.bfloat16, out.data_ptr())
    return out


class Norm(ctypes.Structure):
    """A LayerNorm's weight and bias, float32."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("epsilon", _DOUBLE))


class Layer(ctypes.Structure):
    """One block."""

    _fields_ = (
        *((name, Norm) for name in ("attn_norm", "mlp_norm")),
        *((name, Matrix) for name in ("qkv", "out", "up", "down")),
        ("scale", _DOUBLE),
    )


class Shape(ctypes.Structure):
    """What all blocks have in common."""

    _fields_ = tuple(
        (name, _LONG) for name in ("n_layer", "n_head", "kv_heads", "head_dim", "activation")
    )


class Cache(ctypes.Structure):
    """The memory of a KV cache, ``[L, B, Hkv, S, D]``."""

    _fields_ = (
        ("halves", _LONG),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _LONG) for name in ("layer_stride", "row_stride", "head_stride")),
    )

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        assert keys.stride() == values.stride()
        assert keys.stride()[3:] == (keys.shape[4], 1)
        halves = keys.dtype == torch.bfloat16
        super().__init__(halves, keys.data_ptr(), values.data_ptr(), *keys.stride()[:3])


def blocks(
    x: Tensor,
    layers: "ctypes.Array[Layer]",
    shape: Shape,
    cache: Cache,
    places: Sequence[tuple[int, int]],
) -> None:
    """GPT-2's blocks for a few new tokens, in place: ``x`` ``[M, C]`` of float32. ``places`` has
    each token's row of the cache and its position in it; the cache takes them.
    """
    lib = library()
    assert lib is not None
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    numbers = [number for place in places for number in place]
    tokens = (_LONG * len(numbers))(*numbers)
    lib.gpt_blocks(layers, shape, cache, tokens, len(x), x.data_ptr())


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not there."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise UsageError("there is no C++ compiler (c++, or the one that CXX names)")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = (*FLAGS, f"-march={TARGETS[cpu_limit()] if is_x86 else 'native'}")
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((compiler, flags, platform.machine(), _processor())).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gpt"
    place = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if place.exists():
        return place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # no folder to keep it in
        work = Path(tempfile.mkdtemp())
        place = work / "kept.so"
    try:
        command = [compiler, *flags, "-o", str(work / "new.so"), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise UsageError(f"{compiler} cannot compile {SOURCE.name}: {said}")
        (work / "new.so").replace(place)  # in one step: another process may be at it too
    finally:
        if place.parent != work:
            shutil.rmtree(work, ignore_errors=True)
    return place


def _processor() -> str:
    """What the compiler's ``native`` depends on, for a home that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
