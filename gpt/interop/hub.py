"""Download a model from the Hugging Face hub: only the needed files, into the hub's cache."""

import hashlib
import re
import time
from pathlib import Path

from gpt.config import UsageError, foreign, quoted

NEEDED = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
]
PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def download(name: str) -> Path:
    """Download the model ``name`` (``owner/model``, ``model`` or ``model@revision``), and return
    its folder.

    The client is huggingface_hub, so ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_ENDPOINT`` apply.
    Pickled weights are downloaded only if there are no safetensors. ``UsageError`` if the download
    fails.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise UsageError(
            f"{_no_folder(name)}; to download it from the Hugging Face hub, pip install "
            "huggingface_hub"
        ) from None
    repository, _, at = name.partition("@")
    start = time.time()
    try:
        folder = snapshot_download(repository, revision=at or None, allow_patterns=NEEDED)
        if not any(Path(folder).glob("model*.safetensors*")):
            wanted = NEEDED + PICKLES
            folder = snapshot_download(repository, revision=at or None, allow_patterns=wanted)
    except HFValidationError:
        raise UsageError(
            f"{_no_folder(name)}, and the name is not valid on the Hugging Face hub"
        ) from None
    except Exception as error:  # from the client, the network or the disk
        reason = foreign(str(error).strip().partition("\n")[0])
        raise UsageError(
            f"{_no_folder(name)}, and the download from the hub failed ({type(error).__name__}: "
            f"{reason}); you can give a folder with config.json, weights and tokenizer files "
            "instead"
        ) from None
    _check_new_files(name, Path(folder), start)
    return Path(folder)


def _no_folder(name: str) -> str:
    """The beginning of a message: there is no such folder, and which runs there are instead."""
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/tokenizer.json"))
    more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
    there = f" (there are the runs {', '.join(runs[:5])}{more})" if runs else ""
    return f"model is {quoted(name)}, and there is no such folder here{foreign(there)}"


def _check_new_files(name: str, folder: Path, start: float) -> None:
    """Check the SHA-256 of new files. The hub's cache names large files by their SHA-256."""
    for path in folder.iterdir():
        file = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", file.name) or file.stat().st_mtime < start:
            continue
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.name:
                file.unlink()
                raise UsageError(
                    f"{foreign(path.name)} of {foreign(name)} is damaged (its SHA-256 differs from "
                    "the hub's); the file was deleted, try again"
                )
