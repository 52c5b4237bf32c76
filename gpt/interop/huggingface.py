"""A folder in Hugging Face's layout to a model, without a second copy of its weights."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gpt.config import UsageError
from gpt.interop.files import WeightFiles, forget
from gpt.interop.gpt2 import hugging_face_name, is_buffer, is_transposed, model_config
from gpt.model.gpt import GPT

PIECE = 1 << 20
"""Numbers of a table that are copied at once."""


def load_folder(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPT:
    """The GPT-2 in ``folder``, in evaluation mode; ``UsageError`` if it is not one, or not whole.

    On a CPU weights that have the ``dtype`` already stay in their file, mapped, the matrices
    transposed: nothing is read before it is used, and the file never changes.
    """
    try:
        config = model_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{folder / 'config.json'} cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / 'config.json'} is broken ({error})") from None
    with torch.device("meta"):
        model = GPT(config)
    files = WeightFiles(folder)
    names = _matched(folder, files, model)
    weights = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for theirs, tensor in files.tensors(names):
        name, turned = names[theirs], is_transposed(names[theirs])
        tensor = tensor.T if turned else tensor
        if _usable(tensor, device, dtype):
            weights[name] = tensor
        else:
            weights[name] = torch.empty(tensor.shape, dtype=dtype, device=device)
            step = len(tensor) if turned else max(1, PIECE // max(1, tensor[0].numel()))
            copies += zip(tensor.split(step), weights[name].split(step), strict=True)
    _copy(copies)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


def _usable(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the mapped tensor can be a weight as it lies in the file.

    Where a matrix is turned, a CPU reads it faster for one token in float32, and slower in
    bfloat16. The first safetensors files were not aligned.
    """
    here = torch.device(device).type == "cpu" and tensor.dtype == dtype
    aligned = tensor.data_ptr() % tensor.element_size() == 0
    return here and aligned and (tensor.is_contiguous() or dtype == torch.float32)


def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    """Copy mapped tensors to their places, one thread a core: half of it is the system's work on
    new pages.
    """

    def copy(pair: tuple[Tensor, Tensor]) -> None:
        source, place = pair
        if source.is_contiguous():
            place.copy_(source)
            forget(source)
        else:  # converted first, to turn half the bytes
            place.copy_(source.to(device=place.device, dtype=place.dtype))
            forget(source.T)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(copy, copies))
    finally:
        torch.set_num_threads(threads)


def _matched(folder: Path, files: WeightFiles, model: GPT) -> dict[str, str]:
    """Their name of each tensor that is needed, to this project's; every tensor has to be known."""
    parameters = dict(model.named_parameters())
    ours = {hugging_face_name(name): name for name in parameters}
    names = {}
    for theirs, shape in files.shapes.items():
        bare = theirs.removeprefix("transformer.")
        if bare in ours:
            names[theirs] = ours[bare]
            wanted = list(parameters[ours[bare]].shape)
            wanted = wanted[::-1] if is_transposed(ours[bare]) else wanted
            if shape != wanted:
                raise UsageError(
                    f"the tensor {theirs} in {folder} has the shape {shape}, and its config.json "
                    f"makes it {wanted}"
                )
        elif not is_buffer(bare) and not (model.config.tie_embeddings and bare == "lm_head.weight"):
            raise UsageError(f"the weights in {folder} have {theirs}, which GPT-2 does not have")
    missing = sorted(set(parameters) - set(names.values()))
    if missing:
        raise UsageError(
            f"the weights in {folder} lack {hugging_face_name(missing[0])}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return names


def exported(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as Hugging Face's ``GPT2LMHeadModel`` names and stores them."""
    for name, parameter in model.named_parameters():
        theirs = hugging_face_name(name)
        prefix = "" if theirs.startswith("lm_head.") else "transformer."
        tensor = parameter.detach().T if is_transposed(name) else parameter.detach()
        yield prefix + theirs, tensor.contiguous()
