"""What decoding on a CPU spends its time on, in C++: products of a few rows with a matrix that is
read once, and GPT-2's blocks for a few tokens.

``kernels.cpp`` is compiled for this machine at its first use, in two seconds, with the C++ compiler
that is there (``CXX``, or c++), and kept in the user's cache folder, where nobody else may write.
It works on raw memory, which is checked here, and shares torch's threads (OpenMP). Where there is
no compiler, :func:`library` is ``None``, :func:`problem` says why, and callers use torch's own
operators.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt.config import Activation, ModelConfig, UsageError, foreign
from gpt.device import cpu_limit

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    # Not -ffast-math: what is not a number stays so, and sums have one order whatever the rows.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
TARGETS = {None: "native", "avx2": "x86-64-v3", "default": "x86-64"}
"""The compiler's ``-march`` for each :func:`gpt.device.cpu_limit`, on x86."""
OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""The bits of a file's mode that let others than its owner write."""
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
"""Of a matrix: the number that ``kernels.cpp`` knows each by."""

ACTIVATIONS: dict[Activation, int] = {"gelu_tanh": 0, "gelu": 1, "relu": 2, "silu": 3, "tanh": 4}

KNOWN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("vocab_size", "context_length", "tie_embeddings"), lambda value: True),
    **dict.fromkeys(("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"), lambda value: True),
    **dict.fromkeys(("bias", "norm_eps", "scale_attention"), lambda value: True),
    "scale_attention_by_layer": lambda value: True,
    "dropout": lambda value: True,  # models that are made to run have none
    "activation": ACTIVATIONS.__contains__,
    "head_dim": lambda value: True,
    "position": lambda value: value == "learned",
    "norm": lambda value: value == "layer",
    "norm_placement": lambda value: value == "pre",
    "mlp": lambda value: value == "plain",
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
    """The compiled functions; ``None`` where they cannot be had: see :func:`problem`."""
    return _library()[0]


def problem() -> str | None:
    """Why there is no :func:`library`, in a sentence."""
    return _library()[1]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return load(), None
    except (UsageError, OSError) as error:
        return None, foreign(error)


def load() -> ctypes.CDLL:
    """The compiled functions: those that are kept, or compiled anew and kept where that is safe.
    ``UsageError`` or ``OSError`` if they cannot be had.
    """
    command, key = _command()
    folder = _folder()
    for kept in folder.glob(f"kernels-{key}-*.so") if folder else ():
        if _is_whole(kept):
            return _declared(ctypes.CDLL(str(kept)))
    with tempfile.TemporaryDirectory(prefix="gpt-kernels-") as work:
        made = Path(work) / "kernels.so"
        done = subprocess.run(
            [*command, "-o", str(made), str(SOURCE)],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise UsageError(f"{command[0]} cannot compile {SOURCE.name}: {foreign(said)}")
        place = _keep(made, folder, key) if folder else None
        # what is loaded stays loaded, also when its file is removed
        return _declared(ctypes.CDLL(str(place or made)))


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.gpt_linear.argtypes = [ctypes.POINTER(Matrix), _LONG, _POINTER, _POINTER]
    lib.gpt_dense.argtypes = [ctypes.POINTER(Matrix), _LONG, _POINTER]
    structures = [ctypes.POINTER(kind) for kind in (_Layer, _Shape, Cache)]
    lib.gpt_blocks.argtypes = [*structures, ctypes.POINTER(_LONG), _LONG, _POINTER]
    for function in (lib.gpt_linear, lib.gpt_dense, lib.gpt_blocks):
        function.restype = None
    return lib


def _address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int:
    """Where the tensor's numbers are; ``ValueError`` unless they lie as the kernels read them."""
    if (
        tensor is None
        or tensor.dtype != dtype
        or tensor.shape != shape
        or not tensor.is_cpu
        or not tensor.is_contiguous()
    ):
        has = "nothing" if tensor is None else f"{tensor.dtype} {[*tensor.shape]} {tensor.device}"
        raise ValueError(f"the kernels take {dtype} {[*shape]} on the CPU, and not {has}")
    return tensor.data_ptr()


class Matrix(ctypes.Structure):
    """A matrix ``[N, K]`` as ``kernels.cpp`` sees it. It keeps its tensors alive.

    ``kind`` is one of :data:`FORMATS`; :mod:`gpt.generation.quantisation` says how each lies in
    memory. ``ValueError`` for tensors that lie otherwise, or not in the CPU's memory.
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
        N, padded = len(weights), -(-width // 128) * 128
        scale = low = None
        if kind == "int8":
            data = _address(weights, torch.uint8, N, padded)
            scale = _address(scales, torch.float32, N)
        elif kind == "int4":
            data = _address(weights, torch.uint8, N, padded // 2)
            scale, low = (_address(t, torch.bfloat16, N, padded // 32) for t in (scales, lows))
        else:
            data = _address(weights, getattr(torch, kind), N, width)
        added = None if bias is None else _address(bias, torch.float32, N)
        super().__init__(FORMATS[kind], N, width, data, scale, low, added)
        self.tensors = weights, scales, lows, bias


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
    is_packed = matrix.kind in (FORMATS["int8"], FORMATS["int4"])
    if not is_packed or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"int8 and int4 become float32 or bfloat16, and not {dtype}")
    out = torch.empty(matrix.N, matrix.K, dtype=dtype, device="cpu")
    lib.gpt_dense(matrix, dtype == torch.bfloat16, out.data_ptr())
    return out


class Norm(ctypes.Structure):
    """A LayerNorm's weight ``[C]`` and bias, float32. It keeps them alive."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("epsilon", _DOUBLE))

    def __init__(self, weight: Tensor, bias: Tensor | None, epsilon: float) -> None:
        self.width = weight.numel()
        places = (
            None if tensor is None else _address(tensor, torch.float32, self.width)
            for tensor in (weight, bias)
        )
        super().__init__(*places, epsilon)
        self.tensors = weight, bias


class Layer(NamedTuple):
    """One block; ``scale`` multiplies its attention scores."""

    attn_norm: Norm
    mlp_norm: Norm
    qkv: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    scale: float


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("attn_norm", "mlp_norm")),
        *((name, Matrix) for name in ("qkv", "out", "up", "down")),
        ("scale", _DOUBLE),
    )


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, _LONG) for name in ("n_layer", "n_head", "kv_heads", "head_dim", "activation")
    )


class Cache(ctypes.Structure):
    """The memory of a KV cache, ``[L, B, Hkv, S, D]``. It keeps it alive."""

    _fields_ = (
        ("halves", _LONG),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _LONG) for name in ("layer_stride", "row_stride", "head_stride")),
    )

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        halves = keys.dtype == torch.bfloat16
        dtype = torch.bfloat16 if halves else torch.float32
        places = (_address(tensor, dtype, *keys.shape) for tensor in (keys, values))
        super().__init__(halves, *places, *keys.stride()[:3])
        self.tensors = keys, values


class Blocks:
    """GPT-2's blocks as ``kernels.cpp`` takes them. ``ValueError`` if their widths do not fit each
    other. They keep their tensors alive.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        n_head: int,
        kv_heads: int,
        head_dim: int,
        activation: Activation,
    ) -> None:
        self.layers, self.width = layers, n_head * head_dim
        inner = layers[0].up.N if layers else 0
        C, qkv = self.width, (n_head + 2 * kv_heads) * head_dim
        for layer in layers:
            matrices = ((m.N, m.K) for m in (layer.qkv, layer.out, layer.up, layer.down))
            norms = layer.attn_norm.width, layer.mlp_norm.width
            if norms != (C, C) or [*matrices] != [(qkv, C), (C, C), (inner, C), (C, inner)]:
                raise ValueError(f"the blocks' matrices do not fit a width of {C}")
        if not layers or head_dim % 16 or n_head % kv_heads:
            raise ValueError("the kernels take blocks whose heads have 16, 32, 48, ... numbers")
        heads = n_head, kv_heads, head_dim
        self._array = (_Layer * len(layers))(*(_Layer(*layer) for layer in layers))
        self._shape = _Shape(len(layers), *heads, ACTIVATIONS[activation])

    def run(self, x: Tensor, cache: Cache, places: Sequence[tuple[int, int]]) -> None:
        """The blocks for a few new tokens, in place: ``x`` ``[M, C]`` of float32. ``places`` has
        each token's row of the cache and its position in it; the cache takes them, and must have
        these rows, positions, and layers.
        """
        lib = library()
        assert lib is not None
        numbers = [number for place in places for number in place]
        tokens = (_LONG * len(numbers))(*numbers)
        address = _address(x, torch.float32, len(places), self.width)
        lib.gpt_blocks(self._array, self._shape, cache, tokens, len(places), address)


def _command() -> tuple[list[str], str]:
    """What compiles the source, but for the names of files, and the key of what comes out."""
    try:
        words = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise UsageError(f"CXX is {foreign(os.environ['CXX'])!r}: {error}") from None
    compiler = shutil.which(words[0])
    if compiler is None:
        raise UsageError(f"there is no C++ compiler '{foreign(words[0])}', and CXX can name one")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    march = f"-march={TARGETS[cpu_limit()] if is_x86 else 'native'}"
    command = [compiler, *words[1:], *FLAGS, march]
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((command, platform.machine(), _processor())).encode())
    return command, key.hexdigest()[:16]


def _folder() -> Path | None:
    """Where the user's kernels are kept and nobody else can write; ``None`` if there is no such
    folder, and none can be made.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (cache if cache.is_absolute() else Path.home() / ".cache") / "gpt"
        if not folder.is_absolute():
            return None
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        above, status = folder.parent.stat().st_mode, folder.lstat()
        may_be_swapped = above & stat.S_IWOTH and not above & stat.S_ISVTX
        if may_be_swapped or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return None
        if status.st_mode & OTHERS:  # until now: what is in it may be anyone's
            folder.chmod(0o700)
            for kept in folder.glob("kernels-*"):
                kept.unlink()
    except (OSError, RuntimeError):  # RuntimeError: a home that nobody can tell
        return None
    return folder


def _is_whole(kept: Path) -> bool:
    """Whether the file is the user's own, no link, and has the hash that its name says."""
    try:
        status = kept.lstat()
        if status.st_uid != os.getuid() or status.st_mode & OTHERS:
            return False
        return stat.S_ISREG(status.st_mode) and kept.stem.endswith(_hash(kept.read_bytes()))
    except OSError:
        return False


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _keep(made: Path, folder: Path, key: str) -> Path | None:
    """A copy of the file in the folder, flushed before it gets its name; ``None`` if the disk takes
    none.
    """
    data = made.read_bytes()
    place = folder / f"kernels-{key}-{_hash(data)}.so"
    try:
        # private, of an unpredictable name, and new
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".new", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(place)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError:
        return None
    return place


def _processor() -> str:
    """What the compiler's ``native`` depends on, for a home that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
