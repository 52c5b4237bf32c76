"""Models made to run, on disk: their matrices as they were packed, loaded in a moment.

::

    FOLDER/   model.safetensors  packed.json  tokenizer.json

``packed.json`` has the format's version, the format of the weights, the model's configuration, and
the SHA-256 of the weights. These are checked, and then stay mapped.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt.config import ModelConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import Tokenizer
from gpt.generation.inference import InferenceGPT, prepare_for_inference
from gpt.model.gpt import GPT

FORMAT = 1
PACKED, WEIGHTS = "packed.json", "model.safetensors"


def save_packed(model: InferenceGPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write the new folder ``out``; it appears whole or not at all. ``UsageError`` if it is there
    already.
    """
    if out.exists():
        raise UsageError(f"{out} is there already, and an export goes into a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file(model.own_tensors(), work / WEIGHTS)
        meta = {
            "format": FORMAT,
            "weights": model.weights,
            "model": dataclasses.asdict(model.config),
            "sha256": _sha256(work / WEIGHTS),
        }
        (work / PACKED).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        text = tokenizers.to_json(tokenizer)
        (work / "tokenizer.json").write_text(text, encoding="utf-8")
        (work / WEIGHTS).chmod(0o644)
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_packed(name: str | Path) -> bool:
    """Whether ``name`` is a folder of packed weights."""
    return (Path(name) / PACKED).exists()


def load_packed(
    folder: Path, *, device: torch.device | str = "cpu"
) -> tuple[InferenceGPT, Tokenizer]:
    """The model and the tokenizer in ``folder``; ``UsageError`` if it is damaged."""
    try:
        meta = json.loads((folder / PACKED).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise UsageError(
                f"{folder} has format {meta['format']}, and this program reads {FORMAT}"
            )
        config, kind = ModelConfig(**meta["model"]), meta["weights"]
        expected = meta["sha256"]
        with torch.device("meta"):
            model = prepare_for_inference(GPT(config), kind, device=torch.device(device))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise UsageError(f"{folder / PACKED}: {error}") from None
        raise UsageError(f"{folder / PACKED} is broken ({error!r})") from None
    try:
        if _sha256(folder / WEIGHTS) != expected:
            raise UsageError(f"{folder / WEIGHTS} is damaged: it is not what was saved")
        with safe_open(folder / WEIGHTS, framework="pt", device=str(device)) as file:
            model.take({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    return model, tokenizers.load(folder / "tokenizer.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
