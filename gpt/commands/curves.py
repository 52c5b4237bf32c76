"""The pictures of ``gpt report``, drawn with matplotlib as SVG, without a screen or a network."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt.commands.run_data import RunData
from gpt.training.metrics import Record
from gpt.training.stopwatch import PARTS

AXES = {"step": "step", "tokens": "tokens", "time": "hours of training steps"}
"""The axes that curves are drawn over, with their labels."""
WINDOW = 0.05
"""The part of a run over which its band and its mean line are taken."""
STYLE: Any = {
    "svg.hashsalt": "gpt", "svg.fonttype": "none", "font.size": 9, "axes.grid": True,
    "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
Value = Callable[[Record], float | None]


class Chart(NamedTuple):
    """A chart of one figure of all runs."""

    title: str
    value: Value
    of_evaluations: bool = False
    is_noisy: bool = False
    """Whether it is drawn as a band with a mean line."""
    is_log: bool = False


def _field(name: str) -> Value:
    return lambda record: record.get(name)


CHARTS = (
    Chart("training loss, nats per token", _field("loss"), is_noisy=True),
    Chart("validation loss, nats per token", _field("validation_loss"), of_evaluations=True),
    Chart("bits per byte of held-out text", _field("bits_per_byte"), of_evaluations=True),
    Chart("learning rate", _field("learning_rate")),
    Chart("gradient norm", _field("gradient_norm"), is_noisy=True, is_log=True),
    Chart("tokens per second", _field("tokens_per_second"), is_noisy=True),
    Chart("model FLOPs utilisation", _field("mfu"), is_noisy=True),
    Chart("reward", _field("reward"), is_noisy=True),
    Chart("divergence from the start model", _field("kl"), is_noisy=True),
    Chart("margin of preferences", _field("margin"), is_noisy=True),
    Chart("accuracy", _field("accuracy"), is_noisy=True),
    Chart("load of the busiest expert", _field("expert_load"), is_noisy=True),
)
"""Those for which some run has figures are drawn."""


def charts(runs: Sequence[RunData]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each chart's title, and its SVG by axis; an axis that no run has is missing."""
    for chart in CHARTS:
        drawn = {}
        for x in AXES:
            figure = Figure(figsize=(6, 3.2), layout="constrained")
            with mpl.rc_context(STYLE):
                if _draw(figure.add_subplot(), chart, runs, x):
                    drawn[x] = _svg(figure)
        if drawn:
            yield chart.title, drawn
    figure = Figure(figsize=(6, 0.9 + 0.45 * len(runs)), layout="constrained")
    with mpl.rc_context(STYLE):
        if _draw_parts(figure.add_subplot(), runs):
            svg = _svg(figure)
            yield "milliseconds of a step, by part", dict.fromkeys(AXES, svg)


def write_picture(path: Path, runs: Sequence[RunData], x: str) -> None:
    """Write all charts over the axis ``x`` as one PNG."""
    with mpl.rc_context(STYLE):
        there = [c for c in CHARTS if _draw(Figure().add_subplot(), c, runs, x)]
        rows = -(-(len(there) + 1) // 2)
        figure = Figure(figsize=(12, 3.2 * rows), layout="constrained", dpi=120)
        places = figure.subplots(rows, 2, squeeze=False).flatten()
        for chart, axes in zip(there, places, strict=False):
            _draw(axes, chart, runs, x)
            axes.set_title(chart.title)
        if _draw_parts(places[len(there)], runs):
            places[len(there)].set_title("milliseconds of a step, by part")
        else:
            places[len(there)].remove()
        for axes in places[len(there) + 1 :]:
            axes.remove()
        figure.savefig(path, format="png", metadata={"Software": None})


def _draw(axes: Axes, chart: Chart, runs: Sequence[RunData], x: str) -> bool:
    """Draw a chart; ``False`` if no run has its figures."""
    drawn = False
    for number, run in enumerate(runs):
        points = [
            (at, value)
            for record in (run.evaluations if chart.of_evaluations else run.steps)
            if (at := run.axis(x, record)) is not None
            and isinstance(value := chart.value(record), int | float)
            and math.isfinite(value)
        ]
        if not points:
            continue
        drawn, color = True, f"C{number % 10}"
        xs, ys = np.array(points, dtype=float).T
        if chart.is_noisy and len(ys) > 20:
            low, middle, high = _band(ys)
            axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(xs, middle, color=color, label=run.name)
        else:
            marker = "o" if chart.of_evaluations else ""
            axes.plot(xs, ys, color=color, label=run.name, marker=marker, markersize=3)
    if chart.is_log and drawn:
        axes.set_yscale("log")
    axes.set_xlabel(AXES[x])
    if drawn and len(runs) > 1:
        axes.legend(frameon=False)
    return drawn


def _band(ys: "np.ndarray[Any, Any]") -> tuple[Any, Any, Any]:
    """The 10th, the 50th and the 90th percentile around each point."""
    half = max(2, round(WINDOW * len(ys) / 2))
    padded = np.pad(ys, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    low, middle, high = np.quantile(windows, (0.1, 0.5, 0.9), axis=1)
    return low, middle, high


def _draw_parts(axes: Axes, runs: Sequence[RunData]) -> bool:
    """A bar of the mean milliseconds of each part of a step, for each run."""
    shown = [run for run in runs if any("forward_seconds" in each for each in run.steps)]
    left = np.zeros(len(shown))
    for part in PARTS if shown else ():
        name = f"{part}_seconds"
        mean = [float(np.mean([each.get(name, 0.0) for each in run.steps])) for run in shown]
        axes.barh([run.name for run in shown], 1000 * np.array(mean), left=left, label=part)
        left += 1000 * np.array(mean)
    if shown:
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.legend(frameon=False, ncols=len(PARTS), fontsize=8, loc="lower right")
    return bool(shown)


def _svg(figure: Figure) -> str:
    """The picture as an element of a page; its colours of text are the page's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("#000000", "currentColor").replace("<svg ", '<svg role="img" ', 1)
