"""``load(name)``: a model and its tokenizer, ready to generate, wherever they come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from gpt import checkpoint as checkpoints
from gpt.config import UsageError, Weights
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import Tokenizer
from gpt.generation.inference import InferenceGPT, choose_weights, prepare_for_inference
from gpt.interop.hub import download
from gpt.interop.huggingface import load_folder
from gpt.interop.packed import is_packed, load_packed
from gpt.interop.vocabulary import load_tokenizer
from gpt.model.gpt import GPT


class Loaded(NamedTuple):
    """``model, tokenizer = load(...)``."""

    model: GPT
    tokenizer: Tokenizer


def load(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    weights: Weights | None = None,
    trainable: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """The model that ``name`` names, in evaluation mode, and its tokenizer.

    ``name`` is a run's folder (its best checkpoint is taken), one checkpoint's folder, a folder in
    the Hugging Face layout, or a GPT-2 on the hub (``gpt2``, ``owner/model``, ``model@revision``).
    A ``dtype`` of ``None`` takes the one that is stored. With ``weights`` (``"auto"``, ``"int8"``
    and so on) the model is one that is made to run, as
    :func:`gpt.generation.inference.prepare_for_inference` gives it; a folder of packed weights
    always is, and ``trainable`` refuses it. ``UsageError`` if there is no such model; a damaged
    checkpoint is passed over for an older one, and ``say`` is told.
    """
    if weights is not None:
        kind = choose_weights(weights, torch.device(device))
        stored = None if kind in ("int8", "int4") else getattr(torch, kind)
        loaded = load(name, device=device, dtype=stored, say=say)
        if isinstance(loaded.model, InferenceGPT):
            if weights not in ("auto", loaded.model.weights):
                raise UsageError(
                    f"{name} has its weights in {loaded.model.weights}, and weights is {weights!r}"
                )
            return loaded
        return Loaded(prepare_for_inference(loaded.model, kind), loaded.tokenizer)
    path = Path(name)
    if not path.is_dir():
        in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
        if isinstance(name, Path) or path.exists() or in_a_folder:
            raise UsageError(f"model is {str(name)!r}, which is no folder of a run or of a model")
        path = download(name)
    if is_packed(path):
        if trainable:
            raise UsageError(f"{name} has packed weights, which can only run")
        return Loaded(*load_packed(path, device=device))
    if (path / "config.json").exists():
        model = load_folder(path, device=device, dtype=dtype)
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tokenizer: Tokenizer = load_tokenizer(path, end_of_text=settings.get("eos_token_id"))
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, and the model "
                f"{model.config.vocab_size}"
            )
        return Loaded(model, tokenizer)
    checkpoint = checkpoints.find(path, "best", say=say)
    if checkpoint is None:
        raise UsageError(
            f"model is {str(name)!r}, a folder with neither a checkpoint nor a model in it"
        )
    run = checkpoint.path.resolve().parent.parent
    model = checkpoints.load_model(checkpoint, device=device, dtype=dtype)
    return Loaded(model, tokenizers.load(run / "tokenizer.json"))
