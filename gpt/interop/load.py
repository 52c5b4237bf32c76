"""``load(name)``: a model and its tokenizer, ready to generate, wherever they come from."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint
from gpt.config import UsageError, Weights, foreign, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import Tokenizer
from gpt.device import parse_device
from gpt.files import read_object
from gpt.generation.inference import InferenceGPT, choose_weights, prepare_for_inference
from gpt.interop.adapters import add_adapter, recorded
from gpt.interop.gguf.format import is_gguf
from gpt.interop.gguf.model import described, load_as_stored, load_dense, load_frozen
from gpt.interop.gguf_tokenizer import tokenizer_of
from gpt.interop.hub import download
from gpt.interop.huggingface import load_folder
from gpt.interop.named import named_file
from gpt.interop.packed import is_packed, load_packed
from gpt.interop.vocabulary import load_tokenizer
from gpt.model.adapter import merge
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
    adapter: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Load the model ``name``, in evaluation mode, and its tokenizer.

    ``name`` is a run's folder (uses its best checkpoint), a checkpoint's folder, a folder in the
    Hugging Face layout, a packed folder, a GGUF file, a named model (``smollm2``), or a model on
    the hub (``gpt2``, ``owner/model``, ``model@revision``). A ``dtype`` of ``None`` keeps the
    stored one. With ``weights`` (``"auto"``, ``"int8"``) the model is converted for inference by
    :func:`gpt.generation.inference.prepare_for_inference`. A packed folder always gives such a
    model, and ``trainable`` refuses it. A GGUF file gives one with the file's own numbers, unless
    ``trainable`` (a network of ``dtype``, dequantised) or other ``weights`` are asked for.
    ``adapter`` is the folder of a run that trained one over this model, or one of PEFT: LoRA is
    merged into the weights. The folder of such a run as ``name`` loads its base with it.
    ``UsageError`` if the model does not exist. If a checkpoint is damaged, an older one is used,
    and ``say`` is told.
    """
    if weights is not None and trainable:
        raise UsageError(
            f"weights is {weights!r}, which makes a model for inference, and trainable is set; "
            "leave one of them out"
        )
    if adapter is not None:
        return _adapted(name, adapter, device=device, dtype=dtype, weights=weights, say=say)
    device, path = parse_device(device), _path(name, say)
    if path.is_file():
        return _from_file(path, device=device, dtype=dtype, weights=weights, trainable=trainable)
    if weights is not None and (base := _adapter_in(path)) is not None:
        return _adapted(base, path, device=device, dtype=dtype, weights=weights, say=say)
    if weights is not None:
        kind = choose_weights(weights, device)
        stored = None if kind in ("int8", "int4") else getattr(torch, kind)
        loaded = load(name, device=device, dtype=stored, say=say)
        if isinstance(loaded.model, InferenceGPT):
            if weights not in ("auto", loaded.model.weights):
                raise UsageError(
                    f"weights is {weights!r}, and {foreign(name)} is packed in "
                    f"{loaded.model.weights}"
                )
            return loaded
        return Loaded(prepare_for_inference(loaded.model, kind), loaded.tokenizer)
    if is_packed(path):
        if trainable:
            raise UsageError(f"{foreign(name)} is packed, and can only be run")
        packed = Loaded(*load_packed(path, device=device))
        _check_size(path, packed.tokenizer, packed.model)
        return packed
    if (path / "config.json").exists():
        model = load_folder(path, device=device, dtype=dtype, say=say)
        tokenizer = load_tokenizer(
            path, end_of_text=_ends_of_text(path), rows=model.config.vocab_size
        )
        _check_size(path, tokenizer, model)
        return Loaded(model, tokenizer)
    checkpoint = checkpoints.find(path, "best", say=say)
    if checkpoint is None:
        raise UsageError(f"model is {quoted(str(name))}, a folder without a checkpoint or a model")
    if (own := recorded(checkpoint)) is not None:
        return _adapted(own.base, path, device=device, dtype=dtype, weights=weights, say=say)
    tokenizer = _own_tokenizer(checkpoint)
    model = checkpoints.load_model(checkpoint, device=device, dtype=dtype)
    _check_size(_run_of(checkpoint), tokenizer, model)
    return Loaded(model, tokenizer)


def load_for_adapter(name: str | Path, *, say: Callable[[str], None] = lambda text: None) -> Loaded:
    """The model in a GGUF file, as the base of an adapter, on the CPU: the linear layers of its
    blocks keep the file's blocks and are frozen. ``UsageError`` for a model of another kind.
    """
    path = _path(name, say)
    if not path.is_file():
        raise UsageError(
            f"adapter.base is gguf, and {foreign(name)} is no GGUF file; use int8, int4 or float32"
        )
    source = described(path)
    tokenizer = tokenizer_of(path, source.file.metadata, rows=source.model.config.vocab_size)
    source.file.metadata.clear()
    return Loaded(load_frozen(source), tokenizer)


def _adapter_in(path: Path) -> str | None:
    """The base's name, if the folder is a run or a checkpoint of an adapter."""
    if is_packed(path) or (path / "config.json").exists():
        return None
    checkpoint = checkpoints.find(path, "best")
    own = None if checkpoint is None else recorded(checkpoint)
    return None if own is None else own.base


def _adapted(
    name: str | Path,
    adapter: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    weights: Weights | None,
    say: Callable[[str], None],
) -> Loaded:
    """The model ``name`` with an adapter. LoRA is merged in float32, and the result converted."""
    model, tokenizer = load(name, dtype=torch.float32, trainable=True, say=say)
    device = parse_device(device)
    settings, checkpoint = add_adapter(model, adapter, say=say)
    if checkpoint is not None and (_run_of(checkpoint) / "tokenizer.json").exists():
        tokenizer = _own_tokenizer(checkpoint)  # it may have a chat template that the base lacks
    if settings.kind != "lora":
        if weights in ("int8", "int4"):
            raise UsageError(
                f"weights is {weights}, and the adapter in {foreign(adapter)} is a "
                f"{settings.kind}, which runs with float weights"
            )
        kept = dtype if weights is None else getattr(torch, choose_weights(weights, device))
        return Loaded(model.to(device=device, dtype=kept).eval(), tokenizer)
    merge(model)
    if weights is not None:
        kind = choose_weights(weights, device)
        return Loaded(prepare_for_inference(model.to(device), kind, device=device), tokenizer)
    return Loaded(model.to(device=device, dtype=dtype).eval(), tokenizer)


def _from_file(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    weights: Weights | None,
    trainable: bool,
) -> Loaded:
    """The model in a GGUF file."""
    source = described(path)
    tokenizer = tokenizer_of(path, source.file.metadata, rows=source.model.config.vocab_size)
    source.file.metadata.clear()  # the vocabulary takes some megabytes
    if trainable:
        return Loaded(load_dense(source, device=device, dtype=dtype), tokenizer)
    if weights in (None, "auto"):
        return Loaded(load_as_stored(source, device=device), tokenizer)
    kind = choose_weights(weights, device)
    plain = None if kind in ("int8", "int4") else getattr(torch, kind)
    dense = load_dense(source, device=device, dtype=plain)
    return Loaded(prepare_for_inference(dense, kind), tokenizer)


def _path(name: str | Path, say: Callable[[str], None]) -> Path:
    """The folder or the GGUF file that ``name`` names, here or on the hub."""
    if not isinstance(name, str | Path):
        raise UsageError(f"model is {quoted(name)}, and must be a model's name or a path")
    if not str(name):
        raise UsageError("model is empty, and must be the name of a model or a path")
    path = Path(name)
    try:
        if path.is_dir() or is_gguf(path):
            return path
        in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
        is_file = path.suffix.lower() == ".gguf"
        is_path = isinstance(name, Path) or path.exists() or in_a_folder or is_file
    except (OSError, ValueError):  # a name that no file can have
        is_path = True
    if is_path:
        raise UsageError(
            f"model is {quoted(str(name))}, which is not a folder of a run or a model, nor a GGUF "
            "file"
        )
    return named_file(str(name), say=say) or download(str(name))


def _check_size(folder: Path, tokenizer: Tokenizer, model: GPT) -> None:
    """``UsageError`` for a tokenizer with more tokens than the model has rows."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer in {foreign(folder)} has {tokenizer.vocab_size:,} tokens, and the "
            f"model has {model.config.vocab_size:,}: it belongs to another model"
        )


def _run_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.resolve().parent.parent


def _own_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in the run's folder; ``UsageError`` if the run was trained with another one."""
    path = _run_of(checkpoint) / "tokenizer.json"
    tokenizer = tokenizers.load(path)
    own = tokenizers.fingerprint(tokenizer).hex()
    if checkpoint.progress.get("tokenizer", own) != own:
        raise UsageError(
            f"the tokenizer {foreign(path)} is another one than the checkpoint "
            f"{foreign(checkpoint.path)} was trained with"
        )
    return tokenizer


def _ends_of_text(folder: Path) -> list[int]:
    """The ids that end a text, by the configuration of the model and then of its generation."""
    ends: list[object] = []
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            end = read_object(folder / name, "the configuration").get("eos_token_id")
            ends += end if isinstance(end, list) else [end]
    return [i for i in ends if isinstance(i, int)]
