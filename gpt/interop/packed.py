"""Packed models on disk: the matrices are stored as inference needs them, so they load quickly.

::

    FOLDER/   model.safetensors  packed.json  tokenizer.json

``packed.json`` has the version of this layout, the format of the weights (of each matrix, if they
differ), the model's configuration, and the SHA-256 of ``model.safetensors``, which is checked and
then memory-mapped.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt.config import ModelConfig, UsageError, foreign, with_present_names
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import Tokenizer
from gpt.files import about, new_folder, read_json
from gpt.generation.inference import InferenceGPT, choose_weights
from gpt.generation.quantisation import Format, Matrix
from gpt.interop.files import tensor_shapes
from gpt.kernels import PACKED
from gpt.model.gpt import GPT

FORMAT = 1
DESCRIBED, WEIGHTS = "packed.json", "model.safetensors"


def save_packed(model: InferenceGPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write the new folder ``out``, atomically. ``UsageError`` if it exists or cannot be
    written.
    """
    with new_folder(out) as work:
        try:
            save_file(model.own_tensors(), work / WEIGHTS)
        except SafetensorError as error:
            raise UsageError(f"{foreign(out)} cannot be written: {foreign(error)}") from None
        meta = {
            "format": FORMAT,
            "weights": model.weights,
            "matrices": model.formats() if model.weights == "gguf" else {},
            "model": dataclasses.asdict(model.config),
            "sha256": _sha256(work / WEIGHTS),
        }
        (work / DESCRIBED).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        text = tokenizers.to_json(tokenizer)
        (work / "tokenizer.json").write_text(text, encoding="utf-8")
        (work / WEIGHTS).chmod((work / DESCRIBED).stat().st_mode)  # safetensors writes 0600


def is_packed(name: str | Path) -> bool:
    """Whether ``name`` is a folder of packed weights."""
    return (Path(name) / DESCRIBED).exists()


def load_packed(
    folder: Path, *, device: torch.device | str = "cpu"
) -> tuple[InferenceGPT, Tokenizer]:
    """The model and the tokenizer in ``folder``; ``UsageError`` if it is damaged."""
    described, weights = folder / DESCRIBED, folder / WEIGHTS
    meta = read_json(described, "the packed model")
    with _named(described):
        if meta["format"] != FORMAT:
            version = foreign(meta["format"])
            raise UsageError(f"format is {version}, and this program reads format {FORMAT}")
        config = ModelConfig(**with_present_names(meta["model"]))
        weights_format, expected = meta["weights"], meta["sha256"]
        if weights_format != "gguf":
            weights_format = choose_weights(weights_format, torch.device(device))
        formats = dict(meta.get("matrices", {}))
    shapes = tensor_shapes(weights)
    with _named(described):
        plain = _plain_model(config, shapes)
        kinds: dict[str, Format] = {
            name: formats.get(name) or ("float32" if ".router." in name else weights_format)
            for name, parameter in plain.named_parameters()
            if _stored(name) in shapes
        }
        _check_shapes(plain, kinds, shapes)
    try:
        if _sha256(weights) != expected:
            raise UsageError(f"{foreign(weights)} is damaged: its SHA-256 does not match")
        with safe_open(weights, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError, AttributeError) as error:  # a dtype that torch does not have
        raise UsageError(f"{foreign(weights)} cannot be read: {foreign(error)}") from None
    with _named(weights):
        matrices = {}
        for name, kind in kinds.items():
            path = _stored(name).removesuffix("data")
            parts = [tensors.pop(path + part, None) for part in ("data", "scales", "lows")]
            width = plain.get_parameter(name).shape[1]
            matrices[name] = Matrix.of_tensors(kind, width, *parts)
        model = InferenceGPT.of(
            config, matrices, tensors, weights=weights_format, device=torch.device(device)
        )
    return model, tokenizers.load(folder / "tokenizer.json")


def _stored(name: str) -> str:
    """The name in the file of a weight's matrix."""
    return f"{name.removesuffix('weight')}matrix.data"


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error in the content of the file ``path`` into a ``UsageError`` that names it."""
    try:
        with about(path):
            yield
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{foreign(path)} is broken ({foreign(repr(error))})") from None


def _plain_model(config: ModelConfig, shapes: Mapping[str, list[int]]) -> GPT:
    """The model without numbers. ``UsageError`` if the file has another number of blocks, which
    would take very long to build.
    """
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if len(layers) != config.n_layer:
        asked = foreign(config.n_layer)
        raise UsageError(f"n_layer is {asked}, and {WEIGHTS} has {len(layers)} blocks")
    try:
        with torch.device("meta"):
            return GPT(config)
    except RuntimeError as error:  # more numbers than torch can count
        raise UsageError(f"the model is too large to be built ({foreign(error)})") from None


def _check_shapes(model: GPT, kinds: Mapping[str, Format], shapes: Mapping[str, list[int]]) -> None:
    """``UsageError`` if the file's tensors have not the shapes of the configuration."""
    for name, parameter in model.named_parameters():
        stored, shape = name, [*parameter.shape]
        if name in kinds:
            stored, packed = _stored(name), PACKED.get(kinds[name])
            shape[1] = packed.row_bytes(shape[1]) if packed else shape[1]
        if shapes.get(stored) != shape:
            raise UsageError(
                f"the configuration needs {stored} of shape {shape}, and {WEIGHTS} has "
                f"{shapes.get(stored, 'no such tensor')}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
