"""``load(name)``: a trained model and its tokenizer, ready to generate."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from gpt import checkpoint as checkpoints
from gpt.config import UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import Tokenizer
from gpt.model.gpt import GPT


class Loaded(NamedTuple):
    """``model, tokenizer = load(...)``."""

    model: GPT
    tokenizer: Tokenizer


def load(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """The model of a run (its best checkpoint) or of one checkpoint's folder, in evaluation mode.

    ``UsageError`` if there is none; a damaged checkpoint is passed over for an older one, through
    ``say``.
    """
    path = Path(name)
    if not path.is_dir():
        raise UsageError(f"model is {str(name)!r}, which is no folder of a run or of a checkpoint")
    checkpoint = checkpoints.find(path, "best", say=say)
    if checkpoint is None:
        raise UsageError(
            f"model is {str(name)!r}, a folder with no checkpoint in it; train one first"
        )
    run = checkpoint.path.resolve().parent.parent
    model = checkpoints.load_model(checkpoint, device=device, dtype=dtype)
    return Loaded(model, tokenizers.load(run / "tokenizer.json"))
