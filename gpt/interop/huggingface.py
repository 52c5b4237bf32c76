"""A folder in Hugging Face's layout to a model, without a second copy of its weights."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gpt.config import UsageError, foreign
from gpt.device import check_memory
from gpt.files import read_object
from gpt.interop.files import Stored, WeightFiles
from gpt.interop.gpt2 import (
    bare_name,
    check_sizes,
    hugging_face_name,
    is_buffer,
    is_transposed,
    model_config,
)
from gpt.model.gpt import GPT

PIECE = 1 << 20
"""Numbers of a table that are copied at once."""


def load_folder(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> GPT:
    """The GPT-2 in ``folder``, in evaluation mode; ``UsageError`` if it is not one, or not whole.

    ``dtype`` is the token embedding's in the file if it is ``None``. On a CPU weights that have the
    ``dtype`` already stay in their file, mapped, the matrices transposed: nothing is read before it
    is used. The model never changes the file, and the file must not be changed either while the
    model is there (replacing it by another is no change). ``say`` is told what the model has
    otherwise than its files.
    """
    path = folder / "config.json"
    theirs = read_object(path, "the configuration")
    try:
        config = model_config(theirs, say=lambda text: say(f"{path}: {text}"))
    except UsageError as error:
        raise UsageError(f"{foreign(path)}: {error}") from None
    files = WeightFiles(folder)
    check_sizes(path, config, {bare_name(name): shape for name, shape in files.shapes.items()})
    if config.tie_embeddings and _has_another_head(files):
        config = dataclasses.replace(config, tie_embeddings=False)
    with torch.device("meta"):
        model = GPT(config)
    names = _matched(folder, files, model)
    embedding = next(theirs for theirs, name in names.items() if name == "embed.weight")
    dtype = dtype or next(files.tensors([embedding])).tensor.dtype
    check_memory(
        f"the weights of {foreign(folder)}",
        model.parameter_count() * dtype.itemsize,
        torch.device(device),
        advice="a smaller model, or its weights in bfloat16, would do",
    )
    weights: dict[str, Tensor] = {}
    copies = []
    used = set()  # two weights may be one tensor in the file
    for stored in files.tensors(names):
        name, turned = names[stored.name], is_transposed(names[stored.name])
        tensor = stored.tensor.T if turned else stored.tensor
        if stored.tensor.data_ptr() not in used and _usable(tensor, device, dtype):
            weights[name] = tensor
            used.add(stored.tensor.data_ptr())
        else:
            weights[name] = torch.empty(tensor.shape, dtype=dtype, device=device)
            step = len(tensor) if turned else max(1, PIECE // max(1, tensor[0].numel()))
            pairs = zip(tensor.split(step), weights[name].split(step), strict=True)
            copies += [(stored, source, place) for source, place in pairs]
    _copy(copies)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


def _has_another_head(files: WeightFiles) -> bool:
    """Whether the files hold a head that is not the embedding, whatever the configuration says:
    transformers keeps it then.
    """
    found = {bare_name(name): name for name in files.shapes}
    if not {"lm_head.weight", "wte.weight"} <= found.keys():
        return False
    head, embedding = files.tensors([found["lm_head.weight"], found["wte.weight"]])
    if head.tensor.shape != embedding.tensor.shape:
        return True
    if head.tensor.data_ptr() == embedding.tensor.data_ptr():
        return False
    step = max(1, PIECE // max(1, head.tensor.shape[-1]))
    for one, two in zip(head.tensor.split(step), embedding.tensor.split(step), strict=True):
        if not torch.equal(one, two):
            return True
        head.forget(one)
        embedding.forget(two)
    return False


def _usable(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the tensor can be a weight as it lies in the file.

    Where a matrix is turned, a CPU reads it faster for one token in float32, and slower in
    bfloat16. The first safetensors files were not aligned.
    """
    here = torch.device(device).type == "cpu" and tensor.dtype == dtype
    aligned = tensor.data_ptr() % tensor.element_size() == 0
    return here and aligned and (tensor.is_contiguous() or dtype == torch.float32)


def _copy(copies: list[tuple[Stored, Tensor, Tensor]]) -> None:
    """Copy parts of stored tensors to their places, one thread a core: half of it is the system's
    work on new pages.
    """
    own = threading.local()

    def copy(part: tuple[Stored, Tensor, Tensor]) -> None:
        stored, source, place = part
        if source.is_contiguous():
            place.copy_(source)
            stored.forget(source)
        else:  # converted first, to turn half the bytes, and always in the same memory
            if not hasattr(own, "memory"):
                largest = max(s.numel() for _, s, _ in copies if not s.is_contiguous())
                own.memory = torch.empty(largest, dtype=place.dtype, device=place.device)
            converted = own.memory[: source.numel()].view(source.T.shape)
            place.copy_(converted.copy_(source.T).T)
            stored.forget(source.T)

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
    names: dict[str, str] = {}
    where = foreign(folder)
    for theirs, shape in files.shapes.items():
        bare = bare_name(theirs)
        if bare in ours:
            if ours[bare] in names.values():
                raise UsageError(f"the weights in {where} have {bare} twice, under two names")
            names[theirs] = ours[bare]
            wanted = list(parameters[ours[bare]].shape)
            wanted = wanted[::-1] if is_transposed(ours[bare]) else wanted
            if shape != wanted:
                raise UsageError(
                    f"the tensor {foreign(theirs)} in {where} has the shape {shape}, and its "
                    f"config.json makes it {wanted}"
                )
        elif not is_buffer(bare) and not (model.config.tie_embeddings and bare == "lm_head.weight"):
            raise UsageError(
                f"the weights in {where} have {foreign(theirs)}, which GPT-2 does not have"
            )
    missing = sorted(set(parameters) - set(names.values()))
    if missing:
        raise UsageError(
            f"the weights in {where} lack {hugging_face_name(missing[0])}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return names


def exported(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as Hugging Face's ``GPT2LMHeadModel`` names and stores them, with zeros
    for the biases that it lacks.
    """
    own = dict(model.named_parameters())
    with torch.device("meta"):
        whole = GPT(dataclasses.replace(model.config, bias=True))
    for name, wanted in whole.named_parameters():
        theirs = hugging_face_name(name)
        prefix = "" if theirs.startswith("lm_head.") else "transformer."
        if name in own:
            tensor = own[name].detach()
        else:
            tensor = torch.zeros(wanted.shape, dtype=model.embed.weight.dtype, device="cpu")
        yield prefix + theirs, (tensor.T if is_transposed(name) else tensor).contiguous()
