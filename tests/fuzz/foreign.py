"""Folders in Hugging Face's layout, from a stranger."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import torch

from tests.fuzz.child import Attempt, Place
from tests.fuzz.uses import damage, files_of, still, use

FOREIGN = ("", "-bytes", "-sharded", "-pickles", "-pickle", "-vocab")


class Code:
    """What a pickle asks for that is no tensor."""

    def __init__(self, what: Callable[..., object], *arguments: object) -> None:
        self.what = what, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.what


def case(chance: random.Random, place: Place) -> Attempt:
    """A folder in Hugging Face's layout, from a stranger."""
    folder = place.copy(f"foreign{chance.choice(FOREIGN)}")
    done = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        files = files_of(folder)
        path = still(chance.choice([*files, folder / "config.json"]))
        if path is None:
            continue
        if path.suffix == ".bin" and not done and chance.random() < 0.5:
            done.append(pickled(chance, path, place))
        elif path.name == "config.json" and not done and chance.random() < 0.3:
            settings = json.loads(path.read_text())
            name = chance.choice(
                ("n_layer", "n_embd", "n_head", "n_inner", "vocab_size", "n_positions")
            )
            settings[name] = chance.choice((0, 1, 3, 10**4, 10**6, 10**9, 10**12, 2**63, 10**30))
            path.write_text(json.dumps(settings))
            done.append(f"{name} is {settings[name]}")
        else:
            done.append(damage(chance, path, place, files))
    name, work = use(chance, folder, place)
    return Attempt("; ".join([folder.name, *done, name]), work, keeps=[folder])


def pickled(chance: random.Random, path: Path, place: Place) -> str:
    """Write a pickle with something other in it than dense tensors of floats on the CPU."""
    state = torch.load(path, weights_only=True)
    name = chance.choice(sorted(state))
    tensor = state[name]
    odd = {
        "code": Code(os.system, f"touch {place.outside}/ran"),
        "memory": Code(bytearray, 2**36),
        "meta": tensor.to("meta"),
        "parameter": torch.nn.Parameter(tensor),
        "sparse": tensor.to_sparse(),
        "whole": tensor.to(torch.int8),
        "float8": tensor.to(torch.float8_e5m2),
        "half": tensor.half(),
        "complex": tensor.to(torch.complex64),
        "expanded": tensor.flatten()[:1].expand(tensor.numel()).view(tensor.shape),
        "larger": tensor.flatten()[:1].expand(2**40),
        "nested": {name: tensor},
        "number": 1,
        "scalar": tensor.sum(),
        "nan": tensor * float("nan"),
    }
    kind = chance.choice(list(odd))
    state[name] = odd[kind]
    if chance.random() < 0.2:
        path.write_bytes(pickle.dumps(state if kind in ("code", "memory") else {name: odd["code"]}))
        return f"{path.name} is a bare pickle"
    torch.save(state, path, _use_new_zipfile_serialization=chance.random() < 0.7)
    return f"{path.name}: {name} is {kind}"
