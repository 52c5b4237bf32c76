"""Calls of the Python interface with one or two odd arguments."""

import dataclasses
import numbers
import random
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpt
from gpt import config as configs
from gpt.generation.inference import prepare_for_inference
from tests.fuzz.child import Attempt, Place

GROUPS = [
    kind
    for kind in vars(configs).values()
    if dataclasses.is_dataclass(kind) and kind.__name__.endswith("Config")
]


ODD: dict[str, Callable[[], Any]] = {
    source: eval(f"lambda: {source}", {"np": np, "torch": torch})
    for source in (
        "None", "True", "False", "-1", "0", "1", "2", "10**12", "10**30", "0.5", "-0.5", "1.0",
        "float('nan')", "float('inf')", "1e-320", "''", "'x'", "'cpu'", "'tpu'", "'sgd'", "b'x'",
        "'\\ud800'", "'\\0'", "'x' * 100_000", "[]", "[1]", "[1.0]", "[-1]", "[10**12]", "[None]",
        "['the']", "['the', 1]", "[[1, 2], [3]]", "[[1.5]]", "[[]]", "(1,)", "('x',)", "{}", "{1}",
        "{1: 2.0}", "{'a': 1}", "{1: None}", "{10**12: 1.0}", "{-1: 1.0}", "{1: float('nan')}",
        "object()", "range(3)", "iter('x')", "len", "int", "np.uint8(1)", "np.float32(1)",
        "np.array([1, 2], np.uint8)", "[np.uint8(200), np.int64(3)]", "np.array([[1.0]])",
        "np.array(['the'])", "torch.tensor(1)", "torch.tensor([1, 2])", "torch.tensor([[0.5]])",
        "torch.tensor([1], device='meta')", "'meta'", "torch.device('meta')", "torch.int8",
    )
}  # fmt: skip
DRAWN = [item.name for item in dataclasses.fields(configs.GenerationConfig)]
MORE = ("batch_size", "num_draft_tokens")
NAMES = [source for source, make in ODD.items() if isinstance(make(), str | torch.device)]


def case(chance: random.Random, place: Place) -> Attempt:
    """A call of the Python interface with one or two odd arguments."""
    odd = {name: chance.choice(list(ODD)) for name in ("first", "second")}
    values = {name: ODD[source]() for name, source in odd.items()}
    kind = chance.choice(("config", "config", "generate", "generate", "stream", "load", "packed"))
    if kind == "config":
        return configured(chance, odd["first"])
    run = place.copy("run")
    if kind in ("load", "packed"):
        odd["first"] = chance.choice(NAMES)
        values["first"] = ODD[odd["first"]]()
    if kind == "load":
        name = chance.choice(("name", "device", "weights"))
        arguments = {"name": run, name: values["first"]}
        return Attempt(f"load({name}={odd['first']})", lambda: gpt.load(**arguments), keeps=[run])
    if kind == "packed":
        work = lambda: prepare_for_inference(gpt.load(run).model, values["first"])  # noqa: E731
        return Attempt(f"prepare_for_inference({odd['first']})", work, keeps=[run])
    settings: dict[str, Any] = {"max_new_tokens": 3, "seed": 0}
    told = []
    for place_of in ("first", "second")[: chance.choice((1, 1, 2))]:
        more = MORE if kind == "generate" else MORE[1:]
        name = chance.choice((*DRAWN, *more, *["prompts"] * 8))
        value = values[place_of]
        if name != "max_new_tokens" or not (isinstance(value, int) and value > 9):
            settings[name] = value
            told.append(f"{name}={odd[place_of]}")
    prompt = settings.pop("prompts", "the")
    weights = chance.choice((None, "int8"))

    def work() -> None:
        model = gpt.load(run, weights=weights)
        if kind == "generate":
            gpt.generate(model, prompt, **settings)
        else:
            list(gpt.stream(model, prompt, **settings))

    return Attempt(f"{kind}({', '.join(told)}), weights {weights}", work, keeps=[run])


def configured(chance: random.Random, source: str) -> Attempt:
    """A group of the configuration with one odd value: refused, or of the field's type."""
    group = chance.choice(GROUPS)
    item = chance.choice(dataclasses.fields(group))
    required = {"model": "run", "out": Path("x"), "models": ("run",), "text": "x"}
    names = {item.name for item in dataclasses.fields(group)}
    arguments = {k: v for k, v in required.items() if k in names and group.__name__[:2] in "ExEv"}
    arguments[item.name] = value = ODD[source]()
    if group.__name__ == "TrainConfig" and item.name == "model":
        arguments.pop("out", None)

    def check(fine: bool) -> str:
        wrong = fine and not is_a(value, item.type)
        return f"{group.__name__} accepts what it should not" if wrong else ""

    what = f"{group.__name__}({item.name}={source})"
    return Attempt(what, lambda: group(**arguments), check=check)


def is_a(value: Any, kind: Any) -> bool:
    """Whether ``value`` is the number, choice, truth value or ``None`` that a field's annotation
    says; ``True`` of all other fields.
    """
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in inner
    if typing.get_origin(kind) in (dict, tuple):
        return True
    if int in inner or kind in (int, float):
        number = numbers.Real if kind is float else numbers.Integral
        right = isinstance(value, number) and not isinstance(value, bool)
        return right or (value is None and type(None) in inner)
    return kind is not bool or isinstance(value, bool)
