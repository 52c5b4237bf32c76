"""Load a model from a folder in Hugging Face's layout, without a second copy of its weights."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from gpt.config import ModelConfig, UsageError, foreign
from gpt.device import check_memory
from gpt.files import about, read_object
from gpt.interop.families import Family, family_of
from gpt.interop.files import WeightFiles
from gpt.interop.weights import Rows, fill, layout, their_shape
from gpt.model.gpt import GPT

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""Parts that DataParallel, torch.compile and FSDP add to the names of tensors."""


def load_folder(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> GPT:
    """The model in ``folder``, in evaluation mode. ``UsageError`` if its family is not known, or if
    it is incomplete.

    A ``dtype`` of ``None`` means the dtype of the token embedding in the file. On a CPU, weights
    that have the ``dtype`` already stay memory-mapped (in float32 also transposed matrices), and
    are read when they are used. The model never changes the file. The file must not be changed
    while the model exists, but it may be replaced by another file. ``say`` is told how the model
    differs from its files.
    """
    path = folder / "config.json"
    theirs = read_object(path, "the configuration")
    with about(path):
        family = family_of(theirs)
        config = family.config(theirs, say=lambda text: say(f"{path}: {text}"))
    files = WeightFiles(folder)
    shapes = {bare_name(family, name): shape for name, shape in files.shapes.items()}
    family = family.stored_as(shapes)
    _check_sizes(path, family, config, shapes)
    if config.tie_embeddings and _has_another_head(family, config, files):
        config = dataclasses.replace(config, tie_embeddings=False)
    with torch.device("meta"):
        model = GPT(config)
    held = _matched(folder, files, family, model)
    embedding = next(name for name, rows in held.items() if rows[0].parameter == "embed.weight")
    dtype = dtype or next(files.tensors([embedding])).tensor.dtype
    check_memory(
        f"the weights of {foreign(folder)}",
        model.parameter_count() * dtype.itemsize,
        torch.device(device),
        advice="use a smaller model, or bfloat16",
    )
    fill(model, files, held, device=device, dtype=dtype)
    return model.eval()


def bare_name(family: Family, theirs: str) -> str:
    """A tensor's name as the family has it, without its prefix and the parts that wrappers add."""
    parts = [part for part in theirs.split(".") if part not in _WRAPPERS]
    bare = ".".join(parts)
    for other, usual in family.renamed:
        bare = re.sub(other, usual, bare)
    return bare.removeprefix(family.prefix)


def _check_sizes(
    path: Path, family: Family, config: ModelConfig, shapes: Mapping[str, Sequence[int]]
) -> None:
    """``UsageError`` if a size in the ``config.json`` at ``path`` differs from the ``shapes`` of
    the weights, which are given by bare names.

    Call it before the model is built, so that the model is not larger than the files.
    """
    where = foreign(path)
    layers = {match[1] for name in shapes if (match := family.layer.match(name))}
    if config.n_layer > len(layers):
        raise UsageError(
            f"{where}: {family.settings['n_layer'].theirs} is {config.n_layer:,}, and the weights "
            f"have {len(layers):,} layers"
        )
    for name, fields, wanted in family.sizes(config):
        if name not in shapes:
            raise UsageError(f"the weights in {foreign(path.parent)} lack {name}")
        if list(shapes[name]) != wanted:
            raise UsageError(
                f"{where}: {fields} give {name} the shape {wanted}, and the weights have the shape "
                f"{list(shapes[name])}"
            )


def _head(family: Family, config: ModelConfig) -> str:
    """The bare name of the head's matrix."""
    return bare_name(family, family.parts("head.weight", config)[0].theirs)


def _has_another_head(family: Family, config: ModelConfig, files: WeightFiles) -> bool:
    """Whether the files have a head that differs from the embedding. transformers then uses this
    head, even if the configuration ties them.
    """
    found = {bare_name(family, name): name for name in files.shapes}
    table = bare_name(family, family.parts("embed.weight", config)[0].theirs)
    if not {_head(family, config), table} <= found.keys():
        return False
    head, embedding = files.tensors([found[_head(family, config)], found[table]])
    return not head.equals(embedding)


def _matched(folder: Path, files: WeightFiles, family: Family, model: GPT) -> dict[str, list[Rows]]:
    """The rows of the model that each tensor in the files holds. ``UsageError`` for an unknown
    tensor and for a missing one.
    """
    wanted = {bare_name(family, name): held for name, held in layout(family, model).items()}
    names: dict[str, str] = {}
    where = foreign(folder)
    for theirs, shape in files.shapes.items():
        bare = bare_name(family, theirs)
        if bare in wanted:
            if bare in names.values():
                raise UsageError(f"the weights in {where} have {bare} twice, under two names")
            names[theirs] = bare
            right = their_shape(wanted[bare], model)
            if shape != right:
                raise UsageError(
                    f"the tensor {foreign(theirs)} in {where} has the shape {shape}, and must have "
                    f"{right} by its config.json"
                )
        elif not family.buffers.fullmatch(bare) and bare != _head(family, model.config):
            raise UsageError(
                f"the weights in {where} have {foreign(theirs)}, which {family.name} does not have"
            )
    found = set(names.values())
    missing = sorted(
        (held[0].parameter, name) for name, held in wanted.items() if name not in found
    )
    if missing:
        raise UsageError(
            f"the weights in {where} lack {missing[0][1]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return {theirs: wanted[bare] for theirs, bare in names.items()}
