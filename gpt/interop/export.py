"""A model to a folder that Hugging Face's ``from_pretrained`` reads."""

import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from gpt.config import UsageError
from gpt.data.tokenizer import Tokenizer
from gpt.interop.gpt2 import hugging_face_config
from gpt.interop.huggingface import exported
from gpt.interop.vocabulary import hugging_face_files
from gpt.model.gpt import GPT


def export_huggingface(model: GPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write ``config.json``, the weights and the tokenizer's files into the new folder ``out``.

    The folder appears whole or not at all. ``UsageError`` if it is there already, or if the model
    has what GPT-2 cannot express.
    """
    if out.exists():
        raise UsageError(f"{out} is there already, and an export goes into a new folder")
    end = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    config = hugging_face_config(model.config) | end | {"dtype": _dtype(model)}
    texts = {"config.json": json.dumps(config, indent=2)}
    texts["generation_config.json"] = json.dumps(end, indent=2)
    texts |= hugging_face_files(tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, text in texts.items():
            (work / name).write_text(text + "\n", encoding="utf-8")
        save_file(dict(exported(model)), work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _dtype(model: GPT) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")
