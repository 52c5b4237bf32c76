"""Write a model as a GGUF file, which llama.cpp and what builds on it read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.config import ModelConfig, UsageError, Weights, nearest, quoted
from gpt.data.tokenizer import Tokenizer
from gpt.interop.gguf.architectures import ARCHITECTURES, ROPE_FACTORS, Architecture, Rows, parts
from gpt.interop.gguf.blocks import quantised
from gpt.interop.gguf.format import FORMATS
from gpt.interop.gguf.settings import rope_factors
from gpt.interop.gguf.settings_export import architecture_for, expected, metadata_of
from gpt.interop.gguf.writing import Planned, write
from gpt.interop.gguf_tokenizer_export import tokenizer_metadata
from gpt.model.gpt import GPT

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}
"""The format of matrices for each ``weights``."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""``general.file_type`` (``llama_ftype``)."""
_PLAIN = ("position", "router")
"""Modules whose matrices stay float32."""
_BLOCKS = {each.name: each.block for each in FORMATS.values()}
PIECE = 1 << 20
"""How many numbers are converted at once."""


def export_gguf(
    model: GPT, tokenizer: Tokenizer, out: Path, *, weights: Weights = "auto", name: str = ""
) -> None:
    """Write ``model`` and its tokenizer into the new file ``out``, atomically.

    Matrices have the format ``weights``; ``auto`` keeps the model's own. Norms, biases, positions
    and routers are float32. ``name`` is one of the ``ARCHITECTURES``, by default the first that
    expresses the model. ``UsageError`` if none does, if a matrix does not fit the format, or if
    ``out`` exists.
    """
    kind = str(model.dtype).removeprefix("torch.") if weights == "auto" else weights
    if kind not in KINDS:
        raise UsageError(
            f"weights is {kind!r}, and must be one of {', '.join(KINDS)}{nearest(kind, KINDS)}"
        )
    name = name or architecture_for(model.config)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(
            f"the architecture {quoted(name)} is not one of {known}{nearest(name, ARCHITECTURES)}"
        )
    config = expected(model.config, ARCHITECTURES[name])
    metadata: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": out.stem,
        "general.file_type": _FILE_TYPES[KINDS[kind]],
        "general.quantization_version": 2,
    }
    metadata |= metadata_of(name, model.config)
    metadata |= tokenizer_metadata(tokenizer, rows=config.vocab_size)
    write(out, metadata, _planned(model, config, ARCHITECTURES[name], kind))


Piece = tuple[str, slice, Rows]
"""Some rows of a parameter, and the rows of the tensor that they become."""


def _planned(model: GPT, config: ModelConfig, arch: Architecture, kind: str) -> dict[str, Planned]:
    """The tensors of the file of a model, which is stored as one of the shape ``config``."""
    with torch.device("meta"):
        whole = GPT(config)
    own = {each: tensor.detach() for each, tensor in model.named_parameters()}
    planned = {}
    for tensor, pieces in _held(whole, arch).items():
        first = pieces[0][0]
        n_rows = max(part.stop for _, _, part in pieces)
        shape = [n_rows, *whole.get_parameter(first).shape[1:]]
        if "_exps." in tensor:
            shape = [config.n_expert, n_rows // config.n_expert, *shape[1:]]
        plain = len(shape) == 1 or any(each in first for each in _PLAIN)
        used = "F32" if plain else KINDS[kind]
        if shape[-1] % _BLOCKS[used]:
            raise UsageError(
                f"weights {kind} need rows of a multiple of {_BLOCKS[used]} numbers, and {first} "
                f"has rows of {shape[-1]}; choose float16"
            )
        planned[tensor] = Planned(used, shape, _bytes(used, pieces, own))
    if config.rotary_scaling == "llama3":
        factors = rope_factors(config)
        planned[ROPE_FACTORS] = Planned("F32", [len(factors)], [_row(factors)])
    return planned


def _held(whole: GPT, arch: Architecture) -> dict[str, list[Piece]]:
    """What each tensor of the file holds."""
    held: dict[str, list[Piece]] = {}
    for name, parameter in whole.named_parameters():
        end = 0
        for part in parts(name, whole.config.resolved(), arch):
            start, end = end, end + part.stop - part.start
            held.setdefault(part.tensor, []).append((name, slice(start, end), part))
        assert end == len(parameter), f"the parts of {name} have {end} rows"
    return held


def _bytes(form: str, pieces: list[Piece], own: dict[str, Tensor]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, some rows at a time. Biases that the model lacks are zeros."""
    for name, rows, part in pieces:
        if name not in own:
            yield _row(torch.zeros(rows.stop - rows.start))
            continue
        tensor, order = own[name][rows], part.inverse()
        if order is not None:
            tensor = tensor[order.to(tensor.device)]
        if tensor.ndim == 1:
            yield _row(tensor)
            continue
        for some in tensor.split(max(1, PIECE // tensor.shape[1])):
            yield quantised(form, some.cpu())


def _row(numbers: Tensor) -> NDArray[np.uint8]:
    return quantised("F32", numbers.cpu()[None])
