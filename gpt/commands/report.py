"""``gpt report``: runs as one page that needs nothing beside it."""

import html
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from gpt.commands.run_data import RunData, read_runs
from gpt.config import ReportConfig, UsageError
from gpt.console import tell
from gpt.files import as_training_text, check_output, read_text, write_atomically

AXES = ("step", "tokens", "time")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }}
.charts figure {{ margin: .5rem; }} .charts svg {{ width: 100%; height: auto; }}
figcaption {{ font-weight: 600; }}
table {{ border-collapse: collapse; font-size: .875rem; display: block; overflow-x: auto; }}
td, th {{ border: 1px solid #8886; padding: .2rem .5rem; text-align: left; vertical-align: top; }}
pre {{ white-space: pre-wrap; background: #8881; padding: .5rem; border-radius: 6px; }}
.axis label {{ margin-right: 1rem; }}
{rules}
</style></head><body>
<h1>{title}</h1>
<h2>Summary</h2>{summary}
<h2>Curves</h2>
<div class="axis">over {choices}</div>
<div class="charts">{charts}</div>
<h2>Settings</h2>{settings}
<h2>Samples</h2>{samples}
</body></html>
"""


def report(config: ReportConfig) -> int:
    """Run the command."""
    check_output(config.out, "out")
    if config.png is not None:
        check_output(config.png, "png")
    if config.text is not None:
        return _heat_map(config, config.text)
    runs = read_runs(config.runs)
    try:
        from gpt.commands import curves
    except ImportError:
        raise UsageError(
            "gpt report needs matplotlib, which is not installed: pip install 'gpt[report]'"
        ) from None
    write_atomically(config.out, as_page(runs, list(curves.charts(runs)), config.x))
    tell(f"{config.out}: {', '.join(run.name for run in runs)}")
    if config.png is not None:
        curves.write_picture(config.png, runs, config.x)
        tell(f"{config.png}: the curves over {config.x}")
    return 0


def _heat_map(config: ReportConfig, path: Path) -> int:
    """A text under a model, each token shaded by its probability."""
    from gpt.device import choose_device
    from gpt.generation import explain
    from gpt.generation.text import encode_prompt
    from gpt.interop.load import load

    text = as_training_text(read_text(path, "text"))
    model = load(config.runs[0], device=choose_device(config.device), weights="auto", say=tell)
    ids = encode_prompt(model.tokenizer, text)
    tokens = explain.explain(model, ids[:1], ids[1:])
    opening = explain.token_text(model.tokenizer, ids[0])
    title = f"{path.name} under {config.runs[0]}"
    write_atomically(config.out, explain.as_page(tokens, title=title, opening=opening))
    tell(f"{config.out}: {len(ids):,} tokens of {path}")
    return 0


def as_page(runs: Sequence[RunData], charts: Sequence[tuple[str, dict[str, str]]], x: str) -> str:
    """The whole page. ``charts`` are titles with SVGs by axis."""
    names = ", ".join(run.name for run in runs)
    hidden = (
        f"body:has(#x-{axis}:not(:checked)) .over-{axis}:not(.over-all) {{ display: none }}"
        for axis in AXES
    )
    return PAGE.format(
        title=html.escape(names),
        rules="\n".join(hidden),
        summary=_table(_summary(runs), runs),
        choices="".join(_choice(axis, axis == x) for axis in AXES),
        charts="".join(_figure(number, *chart) for number, chart in enumerate(charts)),
        settings=_settings(runs),
        samples="".join(map(_samples, runs)),
    )


def _choice(axis: str, chosen: bool) -> str:
    mark = " checked" if chosen else ""
    return f'<label><input type="radio" name="x" id="x-{axis}"{mark}> {axis}</label>'


def _figure(number: int, title: str, drawn: dict[str, str]) -> str:
    same = len(set(drawn.values())) == 1 and len(drawn) == len(AXES)
    parts = []
    for axis, svg in list(drawn.items())[: 1 if same else None]:
        unique = f"c{number}{axis}-"  # of the identifiers: all pictures are in one document
        svg = re.sub(r'\bid="', f'id="{unique}', svg)
        svg = svg.replace('"#', f'"#{unique}').replace("url(#", f"url(#{unique}")
        parts.append(f'<div class="over-{axis}{" over-all" if same else ""}">{svg}</div>')
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}</figure>"


def _summary(runs: Sequence[RunData]) -> Iterator[tuple[str, list[str]]]:
    """Rows of figures, one for each run."""

    def last(run: RunData, name: str) -> Any:
        return next((each[name] for each in reversed(run.steps) if name in each), None)

    def least(run: RunData, name: str) -> str:
        found = [(each[name], each["step"]) for each in run.evaluations if name in each]
        return f"{min(found)[0]:.4f} at step {min(found)[1]:,}" if found else ""

    def shown(value: Any, form: str = ",") -> str:
        return "" if value is None else format(value, form)

    yield "steps", [shown(last(run, "step")) for run in runs]
    yield "tokens seen", [shown(last(run, "tokens")) for run in runs]
    yield "epochs", [shown(last(run, "epoch"), ".2f") for run in runs]
    yield "time of training steps", [_clock(last(run, "seconds")) for run in runs]
    yield "last training loss", [shown(last(run, "loss"), ".4f") for run in runs]
    yield "lowest validation loss", [least(run, "validation_loss") for run in runs]
    yield "lowest bits per byte", [least(run, "bits_per_byte") for run in runs]
    yield "tokens per second, last", [shown(last(run, "tokens_per_second"), ",.0f") for run in runs]
    yield "skipped updates", [shown(run.skipped or None) for run in runs]
    for name in dict.fromkeys(name for run in runs for name in run.machine):
        yield name, [str(run.machine.get(name, "")) for run in runs]


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _table(rows: Iterator[tuple[str, list[str]]], runs: Sequence[RunData]) -> str:
    """A table with a column for each run; rows without a value are left out."""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
        if any(cells)
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _settings(runs: Sequence[RunData]) -> str:
    """What differs between the runs, and all settings folded away."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [_value(run.settings.get(name)) for run in runs]) for name in names]
    differing = [row for row in rows if len(set(row[1])) > 1]
    parts = []
    if len(runs) > 1:
        parts.append("<h3>What differs</h3>")
        same = "<p>The runs have the same settings.</p>"
        parts.append(_table(iter(differing), runs) if differing else same)
    parts.append(f"<details><summary>All settings</summary>{_table(iter(rows), runs)}</details>")
    return "".join(parts)


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _samples(run: RunData) -> str:
    """The samples of a run: the last one, and the earlier ones folded away."""
    found = [each for each in run.evaluations if isinstance(each.get("sample"), str)]
    if not found:
        return ""
    *earlier, last = [
        f"<p>step {each['step']:,}, validation loss {each['validation_loss']:.4f}</p>"
        f"<pre>{html.escape(each['sample'])}</pre>"
        for each in found
    ]
    rest = f"<details><summary>{len(earlier)} earlier</summary>{''.join(earlier)}</details>"
    return f"<h3>{html.escape(run.name)}</h3>{last}{rest if earlier else ''}"
