"""Fill a model from files by a family's table, and export a model by the same table.

A weight that the file stores as the model needs it, at an aligned address, stays memory-mapped,
without a second copy.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.interop.families import Family, Part
from gpt.interop.files import Stored, WeightFiles, rows_at_once
from gpt.model.gpt import GPT
from gpt.tensors import is_aligned


class Rows(NamedTuple):
    """Rows of a parameter, and the rows of the family's tensor that hold them."""

    parameter: str
    ours: slice
    theirs: slice
    part: Part


def layout(family: Family, model: GPT) -> dict[str, list[Rows]]:
    """For each tensor of the family, the rows of the model's parameters that it holds.

    The model may be on ``meta``, because only shapes are used.
    """
    found: dict[str, list[Rows]] = {}
    for name, parameter in model.named_parameters():
        end = 0
        for part in family.parts(name, model.config):
            rows = slice(0, len(parameter)) if part.rows is None else part.rows
            start, end = end, end + rows.stop - rows.start
            found.setdefault(part.theirs, []).append(Rows(name, slice(start, end), rows, part))
        assert end == len(parameter), f"the parts of {name} have {end} rows"
    return found


def their_shape(held: Sequence[Rows], model: GPT) -> list[int]:
    """The shape of the tensor that holds these rows."""
    shape = list(model.get_parameter(held[0].parameter).shape)
    shape[0] = max(rows.theirs.stop for rows in held)
    if n := held[0].part.stack:
        return [n, shape[0] // n, *shape[1:]]
    return shape[::-1] if held[0].part.turn else shape


class _Copy(NamedTuple):
    stored: Stored
    source: Tensor
    target: Tensor
    add: float


def fill(
    model: GPT,
    files: WeightFiles,
    held: Mapping[str, Sequence[Rows]],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give a model on ``meta`` its weights. ``held`` maps a tensor's name in the files to the rows
    that it holds; together they must cover all rows of all parameters.
    """
    weights: dict[str, Tensor] = {}
    copies = []
    used = set()  # two weights may be one tensor in the file
    for stored in files.tensors(held):
        for name, ours, theirs, part in held[stored.name]:
            source = stored.tensor.T if part.turn else stored.tensor
            source = source.flatten(0, 1) if part.stack else source
            source = source if part.rows is None else source[theirs]
            shape, address = model.get_parameter(name).shape, source.data_ptr()
            whole = source.shape == shape and not part.add
            if whole and address not in used and _usable(source, device, dtype):
                weights[name] = source
                used.add(address)
                continue
            if name not in weights:
                weights[name] = torch.empty(shape, dtype=dtype, device=device)
            target = weights[name][ours]
            rows = rows_at_once(source) if source.is_contiguous() else len(source)
            pairs = zip(source.split(rows), target.split(rows), strict=True)
            copies += [_Copy(stored, one, two, part.add) for one, two in pairs]
    _copy(copies)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


def _usable(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the file's tensor can be used as a weight without a copy.

    For one token, a CPU multiplies a transposed matrix faster in float32, and slower in bfloat16.
    Products with a tensor that is not aligned would round differently.
    """
    here = torch.device(device).type == "cpu" and tensor.dtype == dtype
    turned = dtype == torch.float32 and tensor.ndim == 2 and tensor.T.is_contiguous()
    return here and is_aligned(tensor) and (tensor.is_contiguous() or turned)


def _copy(copies: list[_Copy]) -> None:
    """Copy parts of stored tensors to their targets, with one thread per core: half of the time is
    spent by the system on new pages.
    """
    own = threading.local()

    def copy(part: _Copy) -> None:
        stored, source, target, add = part
        if source.is_contiguous():
            target.copy_(_plus(source, add) if add else source)
            stored.forget(source)
        else:  # convert first, so that fewer bytes are transposed, and reuse one buffer
            if not hasattr(own, "memory"):
                largest = max(c.source.numel() for c in copies if not c.source.is_contiguous())
                own.memory = torch.empty(largest, dtype=target.dtype, device=target.device)
            converted = own.memory[: source.numel()].view(source.T.shape)
            target.copy_(converted.copy_(_plus(source.T, add) if add else source.T).T)
            if source.T.is_contiguous():
                stored.forget(source.T)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(copy, copies))
    finally:
        torch.set_num_threads(threads)


def _plus(tensor: Tensor, add: float) -> Tensor:
    """The sum, in at least float32: bfloat16 would lose small differences from 1."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + add


def exported(model: GPT, family: Family) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors with the family's names and layout. Biases that the family has and the
    model lacks are zeros.
    """
    own = dict(model.named_parameters())
    with torch.device("meta"):
        whole = GPT(family.stored(model.config))
    for theirs, held in layout(family, whole).items():
        pieces = []
        for name, ours, _, part in sorted(held, key=lambda rows: rows.theirs.start):
            if name in own:
                piece = own[name].detach()[ours]
            else:
                shape = whole.get_parameter(name)[ours].shape
                piece = torch.zeros(shape, dtype=model.embed.weight.dtype, device="cpu")
            pieces.append(_plus(piece, -part.add).to(piece.dtype) if part.add else piece)
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if n := held[0].part.stack:
            tensor = tensor.unflatten(0, (n, -1))
        yield theirs, (tensor.T if held[0].part.turn else tensor).contiguous()
