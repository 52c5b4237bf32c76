"""A model of the Hugging Face hub to a local folder: only the files that are needed, kept in its
cache.
"""

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
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
]
PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def download(name: str) -> Path:
    """The folder of the hub's model ``name`` (``owner/model``, ``model`` or ``model@revision``).

    ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_ENDPOINT`` mean what they mean to huggingface_hub.
    Pickled weights are fetched only where there are no safetensors. ``UsageError`` says what to do
    without.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise UsageError(
            f"model is {quoted(name)}, which is no local folder; to take it from the Hugging Face "
            "hub, pip install huggingface_hub"
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
            f"model is {quoted(name)}, which is no folder and no name on the hub"
        ) from None
    except Exception as error:  # the client's own, its transport's, the disk's
        reason = foreign(str(error).strip().partition("\n")[0])
        raise UsageError(
            f"model is {quoted(name)}, which is no local folder, and it could not be had from the "
            f"hub ({type(error).__name__}: {reason}); a folder with its config.json, weights and "
            "tokenizer files can be given instead"
        ) from None
    _check_new_files(name, Path(folder), start)
    return Path(folder)


def _check_new_files(name: str, folder: Path, start: float) -> None:
    """Compare what has just come with its SHA-256, which the hub's cache names large files by."""
    for path in folder.iterdir():
        file = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", file.name) or file.stat().st_mtime < start:
            continue
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.name:
                file.unlink()
                raise UsageError(
                    f"{foreign(path.name)} of {foreign(name)} did not come as the hub has it (its "
                    "SHA-256 differs); it was deleted: try again"
                )
