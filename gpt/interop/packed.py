"""Packed models on disk: the matrices are stored as inference needs them, so they load quickly.

::

    FOLDER/   model.safetensors  packed.json  tokenizer.json

``packed.json`` has the version of this layout, the format of the weights, the model's
configuration, and the SHA-256 of ``model.safetensors``, which is checked and then memory-mapped.
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

from gpt.config import ModelConfig, UsageError, Weights, foreign, with_present_names
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import Tokenizer
from gpt.files import new_folder, read_json
from gpt.generation.inference import InferenceGPT, prepare_for_inference
from gpt.generation.quantisation import PADDED
from gpt.interop.files import tensor_shapes
from gpt.model.gpt import GPT

FORMAT = 1
PACKED, WEIGHTS = "packed.json", "model.safetensors"


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
            "model": dataclasses.asdict(model.config),
            "sha256": _sha256(work / WEIGHTS),
        }
        (work / PACKED).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        text = tokenizers.to_json(tokenizer)
        (work / "tokenizer.json").write_text(text, encoding="utf-8")
        (work / WEIGHTS).chmod((work / PACKED).stat().st_mode)  # safetensors writes 0600


def is_packed(name: str | Path) -> bool:
    """Whether ``name`` is a folder of packed weights."""
    return (Path(name) / PACKED).exists()


def load_packed(
    folder: Path, *, device: torch.device | str = "cpu"
) -> tuple[InferenceGPT, Tokenizer]:
    """The model and the tokenizer in ``folder``; ``UsageError`` if it is damaged."""
    described, weights = folder / PACKED, folder / WEIGHTS
    meta = read_json(described, "the packed model")
    with _named(described):
        if meta["format"] != FORMAT:
            version = foreign(meta["format"])
            raise UsageError(f"format is {version}, and this program reads format {FORMAT}")
        config = ModelConfig(**with_present_names(meta["model"]))
        kind, expected = meta["weights"], meta["sha256"]
    shapes = tensor_shapes(weights)
    with _named(described):
        plain = _plain_model(config, kind, shapes)
        with torch.device("meta"):
            model = prepare_for_inference(plain, kind, device=torch.device(device))
    try:
        if _sha256(weights) != expected:
            raise UsageError(f"{foreign(weights)} is damaged: its SHA-256 does not match")
        with safe_open(weights, framework="pt", device=str(device)) as file:
            model.take({name: file.get_tensor(name) for name in shapes})
    except (OSError, SafetensorError, AttributeError) as error:  # a dtype that torch does not have
        raise UsageError(f"{foreign(weights)} cannot be read: {foreign(error)}") from None
    return model, tokenizers.load(folder / "tokenizer.json")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error in the content of the file ``path`` into a ``UsageError`` that names it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{foreign(path)}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{foreign(path)} is broken ({foreign(repr(error))})") from None


def _plain_model(config: ModelConfig, kind: Weights, shapes: Mapping[str, list[int]]) -> GPT:
    """The model without numbers, before it is packed. ``UsageError`` if the file's tensors have
    other shapes: packing a much larger model would take very long.
    """
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if len(layers) != config.n_layer:
        asked = foreign(config.n_layer)
        raise UsageError(f"n_layer is {asked}, and {WEIGHTS} has {len(layers)} blocks")
    try:
        with torch.device("meta"):
            model = GPT(config)
    except RuntimeError as error:  # more numbers than torch can count
        raise UsageError(f"the model is too large to be built ({foreign(error)})") from None
    for name, parameter in model.named_parameters():
        shape, packed = list(parameter.shape), f"{name.removesuffix('weight')}matrix.data"
        if packed in shapes:
            name, padded = packed, -(-shape[1] // PADDED) * PADDED
            if ".router." not in name:  # routers stay float32
                shape[1] = {"int8": padded, "int4": padded // 2}.get(str(kind), shape[1])
        if shapes.get(name) != shape:
            raise UsageError(
                f"the configuration needs {name} of shape {shape}, and {WEIGHTS} has "
                f"{shapes.get(name, 'no such tensor')}"
            )
    return model


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
