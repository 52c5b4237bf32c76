"""Write a model as a folder that Hugging Face's ``from_pretrained`` reads."""

import json
from pathlib import Path

from gpt import tensors
from gpt.data.tokenizer import Tokenizer, ends_of
from gpt.files import new_folder
from gpt.interop.families import FAMILIES
from gpt.interop.vocabulary_export import hugging_face_files
from gpt.interop.weights import exported
from gpt.model.gpt import GPT


def export_huggingface(
    model: GPT, tokenizer: Tokenizer, out: Path, *, family: str = "gpt2"
) -> None:
    """Write ``config.json``, the weights and the tokenizer's files into the new folder ``out``.

    ``family`` is a key of ``FAMILIES``. The folder is written atomically. ``UsageError`` if it
    exists, if it cannot be written, or if the family cannot express a setting of the model.
    """
    with new_folder(out) as work:
        table = FAMILIES[family]
        last = tokenizer.end_of_text
        first = tokenizer.first[0] if tokenizer.first else last
        others = sorted(ends_of(tokenizer) - {last})
        end = {"bos_token_id": first, "eos_token_id": [last, *others] if others else last}
        config = table.exported(model.config) | end | {"dtype": _dtype(model)}
        texts = {"config.json": json.dumps(config, indent=2)}
        texts["generation_config.json"] = json.dumps(end, indent=2)
        texts |= hugging_face_files(tokenizer)
        for name, text in texts.items():
            (work / name).write_text(text + "\n", encoding="utf-8")
        tensors.write(work / "model", dict(exported(model, table)), metadata={"format": "pt"})


def _dtype(model: GPT) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")
