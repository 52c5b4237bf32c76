"""One parser for TOML files and the command line.

``dataclass defaults < TOML < command line``. The TOML is flattened into ``--group.field=value``
words, which are put before the user's own words. So both get the same types, checks and
suggestions.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import re
import stat
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from gpt.config.checks import UsageError, foreign, quoted
from gpt.config.data import DataConfig
from gpt.config.model import with_present_names
from gpt.config.training import TrainConfig, run_of

T = TypeVar("T")
C = TypeVar("C", bound=TrainConfig)


def parse(schema: type[T], arguments: Sequence[str], *, prog: str, toml: Path | None = None) -> T:
    """The configuration: the defaults of ``schema``, then ``toml``, then the command line.

    ``arguments`` are the words after the program's name. If the first one is a ``*.toml`` file, it
    replaces ``toml``. For values of a wrong type tyro prints an explanation and exits with status
    2; for misspelt names and values that a configuration refuses, :class:`UsageError`.
    """
    import tyro

    words = list(arguments)
    if words and words[0].endswith(".toml"):
        toml = Path(words.pop(0))
        prog = f"{prog} {toml}"
    tokens = toml_tokens(toml) if toml else []
    _check_names(schema, tokens, f" in {foreign(toml)}")
    _check_names(schema, words, "")
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def optional(info: Any) -> Any:
        """``X | None`` accepts any text, also "None". The value ``None`` means: not given."""
        if info.type not in (str | None, Path | None, tuple[str, ...] | None):
            return None
        [kind] = (each for each in get_args(info.type) if each is not type(None))
        names: dict[Any, str] = {str: "STR", Path: "PATH"}
        one = kind in names
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1 if one else "*",
            metavar=names.get(kind, "[STR [STR ...]]"),
            instance_from_str=lambda words: kind(words[0]) if one else tuple(words),
            is_instance=lambda value: value is None or isinstance(value, kind if one else tuple),
            str_from_instance=lambda value: [str(value)] if one or value is None else list(value),
        )

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                schema,
                prog=prog,
                args=[*tokens, *words],
                use_underscores=True,
                config=(tyro.conf.PositionalRequiredArgs,),
                registry=registry,
            )
    except SystemExit as ended:
        error: BaseException = ended
        while error.__context__ is not None:
            error = error.__context__
            if isinstance(error, UsageError):  # which tyro would print in a box
                told.truncate(0)
                raise error from None
        raise
    finally:
        sys.stderr.write(told.getvalue())


def _check_names(schema: type[Any], words: Sequence[str], where: str) -> None:
    """``UsageError`` for the first option among ``words`` that the schema does not have."""
    known = list(_names(schema))
    for word in words:
        if word == "--":
            return
        name = word[2:].partition("=")[0].replace("-", "_")
        if not re.match(r"--[A-Za-z]", word) or name in (*known, "help"):
            continue
        # The group may be what is missing: n_layer for model.n_layer.
        near = [each for each in known if each.rpartition(".")[2] == name]
        near += difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean --{near[0]}?" if near else "--help lists the options"
        raise UsageError(f"unknown option {quoted('--' + name)}{where}; {advice}")


def _names(schema: type[Any], group: str = "") -> Iterator[str]:
    """The names of a schema's options; those without a default are positional words."""
    for item in dataclasses.fields(schema):
        name, no = f"{group}{item.name}", dataclasses.MISSING
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            yield from _names(item.type, f"{name}.")
        elif item.default is not no or item.default_factory is not no:
            yield from (name, f"{group}no_{item.name}") if item.type is bool else (name,)


def parse_training(
    arguments: Sequence[str], *, prog: str, default: Path, init: Path, schema: type[C]
) -> tuple[C, Path]:
    """The configuration of ``train.py`` (``schema`` is it, or has more options), and the TOML file
    that it comes from.

    This is the file that the user names. Otherwise it is the run's own file if the run is resumed,
    the preset ``init`` with ``--init``, and else ``default``. A ``config.toml`` in a run's folder
    always refers to that folder, even if the folder was moved.
    """
    words = list(arguments)
    if words and words[0].endswith(".toml"):
        path = Path(words[0])
        if path.name == "config.toml" and (path.parent / "tokenizer.json").is_file():
            words[1:1] = ["--run_dir", str(path.parent)]
        return parse(schema, words, prog=prog), path
    given = _peek(words)
    run = run_of(given.run_dir, given.source)
    if given.resume and (run / "config.toml").is_file():
        path = run / "config.toml"
        words = ["--run_dir", str(run), *words]
    else:
        path = init if given.init else default
    return parse(schema, words, prog=prog, toml=path), path


def _peek(words: Sequence[str]) -> argparse.Namespace:
    """The options that select the TOML file, read before the full parse."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run_dir", "--run-dir", default="")
    parser.add_argument("--data.source", dest="source", default=DataConfig().source)
    parser.add_argument("--init", default="")
    parser.add_argument("--resume", action="store_true")
    try:
        return parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError:  # a value is missing: `parse` reports it
        return parser.parse_args([])


def toml_tokens(path: Path) -> list[str]:
    """The TOML file at ``path`` as command-line words."""
    what = f"the configuration {foreign(path)}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{what} is a folder, a pipe or a device, and must be a file")
        words = list(_tokens(tomllib.loads(path.read_bytes().decode("utf-8-sig"))))
        if broken := [word for word in words if "\0" in word]:
            raise ValueError(f"{foreign(broken[0])} has a NUL in it")
        return words
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply") from None
    except ValueError as error:  # also for bad UTF-8, and for an integer of thousands of digits
        raise UsageError(f"{what} is not valid TOML: {foreign(error)}") from None


def _tokens(table: Mapping[str, Any], group: str = "") -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict):
            value = with_present_names(value) if name == "model" else value
            yield from _tokens(value, f"{group}{name}.")
        elif isinstance(value, bool):
            yield f"--{group}{name}" if value else f"--{group}no_{name}"
        elif isinstance(value, list):
            yield f"--{group}{name}"
            yield from (json.dumps(v) if isinstance(v, dict) else str(v) for v in value)
        else:
            yield f"--{group}{name}={value}"


def to_toml(config: Any) -> str:
    """Every field of a configuration as TOML. :func:`parse` reads it back to an equal one."""
    lines, groups = [], []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            groups.append(f"\n[{item.name}]\n{to_toml(value)}")
        else:
            lines.append(f"{item.name} = {_toml_value(value)}\n")
    return "".join(lines + groups)


def _toml_value(value: object) -> str:
    # JSON's strings, booleans and integers are valid TOML, except that TOML requires DEL escaped.
    text = str(value) if isinstance(value, Path) else value
    return repr(text) if isinstance(text, float) else json.dumps(text).replace("\x7f", "\\u007f")
