"""``gpt doctor``: what this machine has, what is missing, and whether the results are right."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from gpt.commands import installed, machine
from gpt.commands.findings import Finding
from gpt.commands.self_test import self_test
from gpt.config import DoctorConfig
from gpt.console import open_console

WIDTH = 18
"""Columns of the names."""
STYLES = {"ok": "green", "note": "cyan", "advice": "yellow", "failed": "bold red"}
WORDS = {"ok": "OK", "note": "-", "advice": "!", "failed": "FAILED"}


def doctor(config: DoctorConfig) -> int:
    """Run the command. The status is 1 if the self-test finds a wrong result."""
    console = open_console()
    found = []
    for finding in findings(config):
        found.append(finding)
        if not config.json:
            _print(console, finding)
    if config.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(each) for each in found], indent=1) + "\n")
    failed = any(each.status == "failed" for each in found)
    if not config.json:
        advised = sum(each.status == "advice" for each in found)
        s = "" if advised == 1 else "s"
        end = "the self-test found wrong results" if failed else "all results are right"
        console.print(f"\n{end}; {advised or 'no'} piece{s} of advice")
    return int(failed)


def findings(config: DoctorConfig) -> Iterator[Finding]:
    """All findings, in the order of the output."""
    checks: Sequence[Callable[[], Finding | list[Finding]]] = (
        *machine.checks(config.folder),
        *installed.checks(hub=config.hub),
        self_test,
    )
    for each in checks:
        found = each()
        yield from [found] if isinstance(found, Finding) else found


def _print(console: Console, finding: Finding) -> None:
    text = Text(f"{WORDS[finding.status]:<7}", style=STYLES[finding.status])
    text.append(f"{finding.name:<{WIDTH}}", style="bold")
    text.append(finding.said, style="default")
    console.print(text)
    if finding.advice:
        console.print(Text(" " * (7 + WIDTH) + finding.advice, style="yellow"))
