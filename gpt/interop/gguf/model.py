"""Load a model from a GGUF file, without a second copy of its weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.config import ModelConfig, UsageError, Weights, foreign, nearest, quoted
from gpt.device import check_memory
from gpt.files import about
from gpt.generation.frozen import freeze_matrices
from gpt.generation.inference import InferenceGPT, choose_weights
from gpt.generation.quantisation import GGUF_BLOCKS, Matrix
from gpt.interop.gguf.architectures import ARCHITECTURES, ROPE_FACTORS, Rows, parts
from gpt.interop.gguf.blocks import dequantised
from gpt.interop.gguf.format import GGUF, Data
from gpt.interop.gguf.settings import check_factors, config_of, n_layers
from gpt.model.adapter import adaptable
from gpt.model.gpt import GPT

PIECE = 1 << 20
"""How many numbers are converted at once."""


class Source(NamedTuple):
    """A model's file: its configuration, and the rows that hold each parameter."""

    file: GGUF
    model: GPT
    """On ``meta``."""
    rows: dict[str, list[Rows]]


def described(path: Path) -> Source:
    """What a file holds. Nothing of the weights is read. ``UsageError`` for a file that is damaged,
    incomplete or not supported.
    """
    file = GGUF(path)
    with about(path):
        return _described(file)


def _described(file: GGUF) -> Source:
    name = file.metadata.get("general.architecture")
    if file.metadata.get("general.type", "model") != "model":
        kind = quoted(file.metadata["general.type"])
        raise UsageError(f"general.type is {kind}, and must be 'model'")
    if file.metadata.get("split.count", 1) != 1:
        raise UsageError("it is one of several parts; merge them with llama.cpp's llama-gguf-split")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(
            f"general.architecture is {quoted(name)}, and must be one of {known}"
            f"{nearest(name, ARCHITECTURES)}"
        )
    shapes = {tensor: entry.shape for tensor, entry in file.tensors.items()}
    config = config_of(name, file.metadata, shapes)
    if config.n_layer != n_layers(shapes):
        raise UsageError(
            f"{name}.block_count is {config.n_layer:,}, and its tensors have {n_layers(shapes):,} "
            "layers"
        )
    if config.n_expert > max((shape[0] for shape in shapes.values()), default=0):
        raise UsageError(f"{name}.expert_count is {config.n_expert:,}, and its tensors have fewer")
    if ROPE_FACTORS in shapes:
        with file.open() as data:
            config = check_factors(config, _rows(data, ROPE_FACTORS, 0, 1)[0].float())
    model = _empty(config)
    arch, full = ARCHITECTURES[name], config.resolved()
    rows = {each: parts(each, full, arch) for each, _ in model.named_parameters()}
    _check_shapes(file, model, rows)
    return Source(file, model, rows)


def _empty(config: ModelConfig) -> GPT:
    try:
        with torch.device("meta"):
            return GPT(config)
    except (RuntimeError, ValueError) as error:  # more numbers than torch can count
        raise UsageError(f"its model cannot be built: {foreign(error)}") from None


def _check_shapes(file: GGUF, model: GPT, rows: dict[str, list[Rows]]) -> None:
    """``UsageError`` unless the file has exactly the tensors of the model, in their shapes. Biases
    may be missing.
    """
    wanted: dict[str, tuple[int, int]] = {}
    for name, held in rows.items():
        shape = model.get_parameter(name).shape
        width = shape[1] if len(shape) == 2 else 1
        for part in held:
            n = wanted.get(part.tensor, (0, 0))[0]
            wanted[part.tensor] = max(n, part.stop), width
    for tensor, (n, width) in wanted.items():
        entry = file.tensors.get(tensor)
        if entry is None:
            if tensor.endswith(".bias"):
                continue
            raise UsageError(f"it lacks the tensor {tensor}")
        found = (entry.shape[0], 1) if len(entry.shape) == 1 else (entry.n_rows, entry.shape[-1])
        if found != (n, width):
            raise UsageError(
                f"the tensor {tensor} has the shape {list(entry.shape)}, which does not fit its "
                f"metadata: {n:,} rows of {width:,} numbers are needed"
            )
    unknown = sorted(file.tensors.keys() - wanted.keys() - {ROPE_FACTORS})
    if unknown:
        raise UsageError(f"it has the tensor {quoted(unknown[0])}, which is not supported")


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Of files whose weights are not float32 or quantised."""
_STORED: dict[str, Weights] = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}
"""The formats here that hold the numbers of a file's format."""


def load_dense(
    source: Source, *, device: torch.device | str, dtype: torch.dtype | None = torch.float32
) -> GPT:
    """The model with dequantised weights of a ``dtype``, in evaluation mode: for training too.
    ``None`` keeps the dtype of the file's embedding; of a quantised one, float32.
    """
    model = source.model
    dtype = dtype or _DTYPES.get(source.file.tensors["token_embd.weight"].format, torch.float32)
    check_memory(
        f"the weights of {foreign(source.file.path)}",
        model.parameter_count() * dtype.itemsize,
        torch.device(device),
        advice="use a smaller model, or its weights as they are in the file",
    )
    weights: dict[str, Tensor] = {}
    with about(source.file.path), source.file.open() as data:
        for name, held in source.rows.items():
            shape = model.get_parameter(name).shape
            weights[name] = dense(data, held, shape, dtype=dtype, device=device)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def dense(
    data: Data,
    held: list[Rows],
    shape: torch.Size,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """A parameter of a ``shape``, dequantised in pieces; zeros for a bias that the file lacks."""
    out = torch.zeros(shape, dtype=dtype, device=device)
    end = 0
    for part in held:
        start, end = end, end + part.stop - part.start
        if part.tensor not in data.gguf.tensors:
            continue
        target = out[start:end]
        order = part.inverse()
        for at, piece in _pieces(data, part):
            piece = piece.view(len(piece), *shape[1:])
            if order is None:
                target[at : at + len(piece)] = piece.to(device)
            else:
                target[order[at : at + len(piece)]] = piece.to(device, dtype)
    return out


def _pieces(data: Data, part: Rows) -> Iterator[tuple[int, Tensor]]:
    """Numbers of some rows at a time, each with the number of its first row in the part."""
    entry = data.gguf.tensors[part.tensor]
    if len(entry.shape) == 1:  # one row, of which each number is a row of the parameter
        yield 0, _rows(data, part.tensor, 0, 1)[0][part.start : part.stop, None]
        return
    some = max(1, PIECE // entry.shape[-1])
    for start in range(part.start, part.stop, some):
        rows = _rows(data, part.tensor, start, min(start + some, part.stop))
        yield start - part.start, rows


def _rows(data: Data, tensor: str, start: int, stop: int) -> Tensor:
    return dequantised(data.gguf.tensors[tensor].format, data.rows(tensor, start, stop))


def load_frozen(source: Source) -> GPT:
    """The model for an adapter, on the CPU: the linear layers of its blocks have the file's own
    numbers and are frozen, and all else is float32. Blocks that no format holds exactly are
    dequantised.
    """
    model = source.model
    linear = {f"{name}.weight" for name in adaptable(model)}
    matrices: dict[str, Matrix] = {}
    tensors: dict[str, Tensor] = {}
    with about(source.file.path), source.file.open() as data, _one_thread():
        for name, held in source.rows.items():
            shape = model.get_parameter(name).shape
            blocks = _blocks(data, held) if name in linear else None
            if blocks is not None:
                matrices[name] = blocks
                continue
            plain = dense(data, held, shape, dtype=torch.float32, device="cpu")
            if name in linear:
                matrices[name] = Matrix("float32", plain)
            else:
                tensors[name] = plain
    freeze_matrices(model, matrices)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def load_as_stored(source: Source, *, device: torch.device | str) -> InferenceGPT:
    """The model for inference with the file's own numbers.

    Blocks of Q8_0, Q4_0 and Q4_1 are laid out anew, and not rounded. F32 and F16 become float32,
    and BF16 stays. A matrix of other blocks, or of several formats (queries, keys and values are
    one matrix here), is dequantised to the format that ``auto`` means on the ``device``. On a CUDA
    device, so are all blocks.
    """
    device, config = torch.device(device), source.model.config
    matrices: dict[str, Matrix] = {}
    tensors: dict[str, Tensor] = {}
    with about(source.file.path), source.file.open() as data, _one_thread():
        for name, held in source.rows.items():
            shape = source.model.get_parameter(name).shape
            if len(shape) == 1 or name == "position.weight":
                tensors[name] = dense(data, held, shape, dtype=torch.float32, device=device)
            else:
                exact = name.endswith(".router.weight")
                matrices[name] = _matrix(data, held, shape, device=device, exact=exact)
    return InferenceGPT.of(config, matrices, tensors, device=device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Hundreds of small copies are faster on one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _matrix(
    data: Data, held: list[Rows], shape: torch.Size, *, device: torch.device, exact: bool
) -> Matrix:
    """A parameter as a matrix; ``exact``: in float32."""
    formats = {data.gguf.tensors[part.tensor].format for part in held}
    on_gpu = device.type == "cuda"  # which has no kernels for blocks
    if not exact and not on_gpu and (matrix := _blocks(data, held)) is not None:
        return matrix.to(device)
    form = formats.pop()
    kind: Weights = "float32" if exact else choose_weights("auto", device)
    if not formats and form in _STORED:
        kind = _STORED[form]
    plain = dense(data, held, shape, dtype=getattr(torch, kind), device=device)
    return Matrix(kind, plain)


def _blocks(data: Data, held: list[Rows]) -> Matrix | None:
    """A parameter with the blocks of the file; ``None`` if no format here holds them."""
    forms = {data.gguf.tensors[part.tensor].format for part in held}
    form = forms.pop()
    if forms or form not in GGUF_BLOCKS:
        return None
    parts = [_ordered(data, part) for part in held]
    blocks = torch.cat(parts) if len(parts) > 1 else parts[0]  # without a copy
    return Matrix.of_blocks(form, blocks.view(len(blocks), -1, GGUF_BLOCKS[form].bytes))


def _ordered(data: Data, part: Rows) -> Tensor:
    """The bytes of some rows, in the order of the parameter."""
    rows, order = torch.from_numpy(data.rows(part.tensor, part.start, part.stop)), part.order()
    return rows if order is None else rows[order]
