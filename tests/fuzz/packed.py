"""Folders of packed weights, and packed models that were changed in Python."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

import gpt
from tests.fuzz.child import Attempt, Place
from tests.fuzz.samples import PACKED, PROMPTS
from tests.fuzz.uses import damage, files_of, sha256, still, use


def case(chance: random.Random, place: Place) -> Attempt:
    """A folder of packed weights, or a packed model that was changed in Python."""
    kind = chance.choice(PACKED)
    folder = place.copy(f"packed-{kind}")
    if chance.random() < 0.25:
        return operated(chance, folder)
    done = []
    for _ in range(chance.choice((1, 1, 2))):
        names = ("packed.json", "packed.json", "model.safetensors", "tokenizer.json")
        path = still(folder / chance.choice(names))
        if path is None:
            continue
        if path.name == "packed.json" and not done and chance.random() < 0.4:
            meta = json.loads(path.read_text())
            name = chance.choice(sorted(meta["model"]))
            meta["model"][name] = chance.choice(
                (0, 1, 2, 3, 4, 64, 10**4, 10**9, 10**12, 2**63, True)
            )
            path.write_text(json.dumps(meta))
            done.append(f"{name} is {meta['model'][name]}")
        else:
            done.append(damage(chance, path, place, files_of(folder)))
    if chance.random() < 0.7:
        try:
            meta = json.loads((still(folder / "packed.json") or Path("none")).read_text())
            digest = sha256(folder / "model.safetensors")
            (folder / "packed.json").write_text(json.dumps(meta | {"sha256": digest}))
            done.append("signed")
        except (OSError, ValueError, TypeError, RecursionError):
            done.append("not signed")
    name, work = use(chance, folder, place)
    return Attempt("; ".join([kind, *done, name]), work, keeps=[folder])


def operated(chance: random.Random, folder: Path) -> Attempt:
    """A packed model of which Python code has changed a part: an error is right, a crash is not."""
    changes: dict[str, Callable[[gpt.GPT], object]] = {
        "meta is torch's default device": lambda model: torch.set_default_device("meta"),
        "float64 is torch's default": lambda model: torch.set_default_dtype(torch.float64),
        "bfloat16 is torch's default": lambda model: torch.set_default_dtype(torch.bfloat16),
        "a block is gone": lambda model: model.blocks.__delitem__(slice(1, None)),
        "a block is doubled": lambda model: model.blocks.append(model.blocks[0]),
        "blocks in another order": lambda model: model.blocks.insert(0, model.blocks.pop(1)),
        "to bfloat16": lambda model: model.to(torch.bfloat16),
        "to float64": lambda model: model.double(),
        "to meta": lambda model: model.to("meta"),
        "another configuration": lambda model: setattr(
            model,
            "config",
            dataclasses.replace(
                model.config, **{chance.choice(("n_layer", "n_head", "context_length")): 4}
            ),
        ),
        "a norm is gone": lambda model: setattr(model.blocks[0], "attn_norm", torch.nn.Identity()),
        "a longer prompt": lambda model: None,
    }
    done = chance.choice(list(changes))
    prompts = [
        chance.choice(PROMPTS) * chance.choice((1, 3)) for _ in range(chance.choice((1, 2, 9)))
    ]
    settings = chance.choice(({}, {"num_beams": 3}, {"num_samples": 5}, {"num_draft_tokens": 3}))

    def work() -> None:
        loaded = gpt.load(folder)
        changes[done](loaded.model)
        gpt.generate(loaded, prompts, max_new_tokens=20, seed=0, **settings)

    return Attempt(
        f"{folder.name}: {done}; {settings}",
        work,
        keeps=[folder],
        may_raise=done != "a longer prompt",
    )
