"""Commands with odd words, or with a TOML file that is odd: read, or run."""

import dataclasses
import random
from typing import Any

from gpt import config as configs
from gpt.config import TrainConfig, parse, to_toml
from tests.fuzz import mutate
from tests.fuzz.child import Attempt, Place
from tests.fuzz.uses import command

COMMANDS = {
    "train": configs.TrainConfig,
    "sample": configs.SampleConfig,
    "prepare": configs.PrepareConfig,
    "export": configs.ExportConfig,
    "evaluate": configs.EvaluateConfig,
}
REQUIRED = {
    "train": [],
    "sample": [],
    "prepare": [],
    "export": ["run", "out"],
    "evaluate": ["run", "--text", "x"],
}


HUGE = (
    "--model.vocab_size 1000000000000",
    "--model.n_embd 300000 --model.n_head 3",
    "--model.n_inner 1000000000000",
    "--model.n_layer 1000000000",
    "--training.micro_batch_size 1000000000 --training.batch_tokens 16000000000",
    "--model.context_length 1000000 --training.batch_tokens 2000000 --training.micro_batch_size 2",
    "--evaluation.sample_prompt \udcff",
)
BOUNDED = (
    "--training.max_steps 5 --evaluation.sample_tokens 3 --training.compile off "
    "--training.device cpu --log.wandb off --log.profile 0"
)
"""Last words of a run: what would take long for good reasons."""


def fields_of(kind: type, group: str = "") -> dict[str, str]:
    """The options of a command, each with the name of its type."""
    found = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            found |= fields_of(item.type, f"{group}{item.name}.")
        else:
            found[group + item.name] = str(item.type)
    return found


def case(chance: random.Random, place: Place) -> Attempt:
    """A command with odd words, or with a TOML file that is odd: read, or run."""
    name = chance.choice(("train", "train", *COMMANDS))
    odd = mutate.words(chance, fields_of(COMMANDS[name])) if chance.random() < 0.8 else []
    toml = place.copy("start.toml")
    if name == "train" and (not odd or chance.random() < 0.3):
        mutate.content(chance, toml)
    if chance.random() < 0.6:
        words = [*([str(toml)] if name == "train" else []), *REQUIRED[name], *odd]

        def work() -> None:
            config = parse(COMMANDS[name], words, prog="gpt")
            if isinstance(config, TrainConfig):
                again = place.inside / "again.toml"
                again.write_text(to_toml(config), encoding="utf-8")
                assert repr(parse(TrainConfig, [str(again)], prog="gpt")) == repr(config)

        return Attempt(f"parse {name} {shown(words)}", work)
    run, book = place.copy("run"), place.copy("book.txt")
    if name == "train":
        if chance.random() < 0.2:
            odd = chance.choice(HUGE).split(" ")
        words = [toml, "--data.source", book, "--run_dir", "new", *odd, *BOUNDED.split()]
    elif name == "sample":
        words = ["--model", run, "--prompt", "the", *odd, "--max_new_tokens", 4]
    elif name == "prepare":
        words = ["--data.source", book, "--out", "new", *odd]
    elif name == "export":
        words = [run, place.inside / "new", *odd]
    else:
        words = [run, "--text", book, *odd]
    return Attempt(f"run {name} {shown(odd)}", command(name, *words), keeps=[run])


def shown(words: list[Any]) -> str:
    """The words as a person would look at them."""
    return " ".join(repr(w if len(w) < 80 else f"{w[:20]}... of {len(w)}") for w in map(str, words))
