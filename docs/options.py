"""Write ``docs/options.md``, every option of every command: ``python docs/options.py``.

An option's meaning is the string below its field in ``gpt/config``.
"""

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gpt.cli import COMMANDS
from gpt.config import EvaluateConfig, ExportConfig, PrepareConfig, SampleConfig, TrainConfig

PAGE = Path(__file__).with_suffix(".md")
SCHEMAS = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "prepare": PrepareConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
}
OPENING = """# Options

`python docs/options.py` writes this page from the fields in `gpt/config`.
`gpt COMMAND --help` prints the same. `train.py` is `gpt train`, and `sample.py` is `gpt sample`.
The defaults are those without a TOML file. `no_` before its name turns a switch off:
`--model.no_bias`.
"""
TABLE = "| option | default | meaning |\n|---|---|---|"


def page() -> str:
    """The whole page, as Markdown."""
    parts = [OPENING]
    for name, schema in SCHEMAS.items():
        parts += [f"## gpt {name}\n", f"{COMMANDS[name].__doc__}\n", TABLE]
        parts += [f"| {' | '.join(row)} |" for row in rows(schema)] + [""]
    return "\n".join(parts)


def rows(schema: type, values: Any = None, group: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each option of a dataclass, those of its groups last. Defaults
    are the ``values``' attributes, or else the fields' own.
    """
    meaning, groups = meanings(schema), []
    for item in dataclasses.fields(schema):
        value = default(item) if values is None else getattr(values, item.name)
        name, shown = f"{group}{item.name}", f"`{value}`"
        if dataclasses.is_dataclass(value):
            groups.append((type(value), value, f"{name}."))
            continue
        if value is dataclasses.MISSING:
            shown = "needed"
        elif value in (None, "", (), {}):
            shown = ""
        if get_origin(item.type) is Literal:
            shown += f" of {', '.join(get_args(item.type))}"
        option = name if shown == "needed" else f"--{name}"
        yield f"`{option}`", shown, meaning[item.name].replace("|", "\\|")
    for each in groups:
        yield from rows(*each)


def default(item: dataclasses.Field[Any]) -> Any:
    """What a field holds when nothing is given."""
    made = item.default_factory is not dataclasses.MISSING
    return item.default_factory() if made else item.default


def meanings(schema: type) -> dict[str, str]:
    """The string below each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for each in schema.__mro__[:-1]:
        [tree] = ast.parse(inspect.getsource(each)).body
        for item, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[item.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
