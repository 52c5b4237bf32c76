"""Write ``docs/options.md``, which lists every option of every command: ``python docs/options.py``.

The description of an option is the string below its field in ``gpt/config``.
"""

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gpt.cli import COMMANDS
from gpt.commands.completion import SCHEMAS
from gpt.commands.tokenizer import COMMANDS as TOKENIZER_COMMANDS

PAGE = Path(__file__).with_suffix(".md")
DESCRIPTIONS = {name: command.__doc__ for name, command in COMMANDS.items()}
DESCRIPTIONS |= {
    f"tokenizer {name}": command.__doc__ for name, command in TOKENIZER_COMMANDS.items()
}
OPENING = """# Options

`python docs/options.py` writes this page from the fields in `gpt/config`.
`gpt COMMAND --help` prints the same. `train.py` is `gpt train`, and `sample.py` is `gpt sample`.
The defaults apply without a TOML file. To turn a switch off, put `no_` before its name:
`--model.no_bias`.
"""
TABLE = "| option | default | meaning |\n|---|---|---|"


def page() -> str:
    """The whole page, as Markdown."""
    parts = [OPENING]
    for name, schema in SCHEMAS.items():
        parts += [f"## gpt {name}\n", f"{DESCRIPTIONS[name]}\n", TABLE]
        parts += [f"| {' | '.join(row)} |" for row in rows(schema)] + [""]
    return "\n".join(parts)


def rows(schema: type, values: Any = None, group: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each option of a dataclass; its groups come last. The defaults
    are the attributes of ``values``, or those of the fields.
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
    """The default value of a field."""
    made = item.default_factory is not dataclasses.MISSING
    return item.default_factory() if made else item.default


def meanings(schema: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its base classes."""
    found: dict[str, str] = {}
    for each in schema.__mro__[:-1]:
        [tree] = ast.parse(inspect.getsource(each)).body
        for item, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[item.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
