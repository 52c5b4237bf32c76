"""Jinja's sandbox with limits on time and memory.

A template comes with a model, from anywhere, so it is a program of a stranger. Jinja's immutable
sandbox keeps it from Python's internals and from changing its input. The limits here keep it from
running for ever: Jinja has no loop without an end, so a count at the start of each loop's and
macro's body bounds the steps, and a weight of each assigned value, argument and output bounds what
one step can do. Both are calls that are inserted into the template's syntax tree.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpt.config import UsageError, quoted

MOST_STEPS = 3_000_000
"""Bodies of loops and macros that one rendering may run, and items of lists that it may look at."""
MOST_SIZE = 10_000_000
"""Characters and items of one value, and of all outputs together."""
MOST_SECONDS = 20.0


class LimitError(Exception):
    """A template that goes beyond a limit; the text completes ``the chat template ...``."""


class RefusedError(Exception):
    """The message that a template gave to ``raise_exception``."""


class Limits:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = self.written = 0
        self.end = time.monotonic() + MOST_SECONDS

    def step(self, characters: int = 0) -> str:
        """Count the body of a loop or macro, which has ``characters`` of constant text."""
        self.steps += 1
        self.written += characters
        self._check_steps()
        self._check(self.written)
        return ""

    def _check_steps(self) -> None:
        if self.steps > MOST_STEPS:
            raise LimitError(f"takes more than {MOST_STEPS:,} steps, and was ended")
        if time.monotonic() > self.end:
            raise LimitError(f"takes more than {MOST_SECONDS:g} seconds, and was ended")

    def output(self, value: Any) -> Any:
        """Count what a ``{{ ... }}`` writes."""
        self.written += self.weigh(value)
        self._check(self.written)
        return value

    def keep(self, value: Any) -> Any:
        """``value``, if it is not too large."""
        self.weigh(value)
        return value

    def weigh(self, value: Any, before: int = 0) -> int:
        """The number of characters and items in ``value``; what occurs twice counts twice."""
        weight = before + 1
        if isinstance(value, str | bytes):
            weight += len(value)
        elif isinstance(value, int):
            if value.bit_length() > 4096:
                raise LimitError("computes a number that is too large, and was ended")
        elif isinstance(value, Mapping):
            self.steps += len(value)
            for key, item in value.items():
                weight = self.weigh(item, self.weigh(key, weight))
        elif isinstance(value, list | tuple | set | frozenset):
            self.steps += len(value)
            self._check_steps()
            for item in value:
                weight = self.weigh(item, weight)
        self._check(weight)
        return weight

    def _check(self, size: int) -> None:
        if size > MOST_SIZE:
            raise LimitError(f"makes more than {MOST_SIZE:,} characters, and was ended")

    def check_call(self, name: str, arguments: Sequence[Any]) -> None:
        """Before a filter or method ``name``, whose first argument is what it works on: its result
        can be a few numbers' product with its arguments.
        """
        sizes = [self.weigh(argument) for argument in arguments]
        own = sizes[0] if sizes else 1
        for argument in arguments[1:]:
            if isinstance(argument, int) and abs(argument) > 1:
                self._check(own * abs(argument))
        match name, arguments:
            case "replace", [_, str() as old, str() as new, *_]:
                self._check(own + (own // max(1, len(old)) + 1) * len(new))
            case "join", [_, *_] if len(arguments) > 1:
                self._check(sizes[0] * sizes[1])
            case (("format" | "%"), [str() as form, *rest]):
                widths = [int(digits[:9]) for digits in re.findall(r"\d+", form)]
                widths += [abs(n) for n in rest if isinstance(n, int)]  # of a '*' or a '{}'
                self._check(sum(sizes) * (1 + form.count("{") + form.count("%")) + sum(widths))

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """Before ``left operator right``."""
        if operator == "**":
            if not all(isinstance(n, int | float) and abs(n) < 1e6 for n in (left, right)):
                raise LimitError("computes a power that is too large, and was ended")
            self._check(abs(int(right)) * 3)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and not isinstance(other, int | float):
                    self._check(abs(one) * self.weigh(other))
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            self.check_call("%", [left, *values])
        self.weigh(left)
        self.weigh(right)


def compiled(template: str, limits: Limits) -> Any:
    """A template that is ready to be rendered, once."""
    if len(template) > MOST_SIZE // 20:
        raise LimitError(f"has {len(template):,} characters, which is too long")
    return _environment(limits).from_string(template)


def _environment(limits: Limits) -> Any:
    """Jinja's environment with the settings and functions that ``transformers`` gives templates."""
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UsageError("chat templates need the package jinja2: pip install jinja2") from None

    class Generation(Extension):
        """``{% generation %}``: marks the assistant's text, which changes nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

        def _parse(self, *words: Any) -> Any:
            tree = super()._parse(*words)
            for kind in (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends):
                if tree.find(kind) is not None:
                    raise LimitError(
                        "imports another template, which is not allowed; it must be whole"
                    )
            _count(tree, nodes)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            limits.check_operator(operator, left, right)
            return limits.keep(super().call_binop(context, operator, left, right))

        def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
            own = getattr(function, "__self__", None)
            before = [own] if isinstance(own, str | list | dict) else []
            limits.check_call(
                getattr(function, "__name__", ""), [*before, *args, *options.values()]
            )
            return limits.keep(super().call(context, function, *args, **options))

        def unsafe_undefined(self, owner: Any, attribute: str) -> Any:
            raise LimitError(
                f"reads the attribute {quoted(attribute)} of a {type(owner).__name__}, which is "
                "not allowed"
            )

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[Generation, loopcontrols],
        finalize=limits.output,
    )

    def raise_exception(message: str) -> None:
        raise RefusedError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    filters = environment.filters | {"tojson": tojson}
    environment.filters = {
        name: _checked(name, function, limits) for name, function in filters.items()
    }
    environment.globals = {
        name: value for name, value in environment.globals.items() if name != "lipsum"
    }
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "step_": limits.step,
        "keep_": limits.keep,
    }
    return environment


def _checked(name: str, function: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    """A filter that checks its arguments first, and its result."""

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
        limits.check_call(name, [*arguments[skipped:], *options.values()])
        return limits.keep(function(*arguments, **options))

    return checked


def _count(tree: Any, nodes: Any) -> None:
    """Insert the calls of ``step_`` and ``keep_`` into a template's syntax tree."""

    def call(name: str, *arguments: Any) -> Any:
        return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)

    def text(body: Iterable[Any]) -> int:
        return sum(len(data.data) for node in body for data in node.find_all(nodes.TemplateData))

    bodies = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock))
    for node in list(bodies):
        node.body.insert(0, nodes.ExprStmt(call("step_", nodes.Const(text(node.body)))))
    for node in list(tree.find_all(nodes.Assign)):
        node.node = call("keep_", node.node)
    for node in list(tree.find_all(nodes.For)):
        node.iter = call("keep_", node.iter)
    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [call("keep_", part) for part in node.nodes]
    tree.set_environment(tree.environment)
