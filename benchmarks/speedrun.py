"""Wall-clock to a validation loss, and the loss after some seconds, of one or more recipes:
``python benchmarks/speedrun.py CONFIG.toml --seconds 66 --loss 1.886``.

Each run is the program's own trainer with the settings of CONFIG, new weights and no early stop, in
a process of its own. With ``--seconds``, the number of steps is planned from a measurement of the
longest steps of the run, so that all rows take about this time (less where steps are shorter at
first); without it, CONFIG says how many steps or minutes. The clock stops
during the ``--evaluations``, which are of the whole held-out part. The seconds to a loss are
interpolated between two of them. Options of train.py after ``--`` are for all runs.
``--row 'NAME: OPTIONS'``, once or more, adds a recipe with other options: an ablation. The runs of
all rows take turns, first all with the first seed. ``--json FILE`` keeps what was measured; what is
there already, with the same CONFIG and machine, is not run again. ``--png FILE`` draws the curves.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

from gpt.config import TrainConfig, UsageError, parse
from gpt.data.prepare import prepare
from gpt.device import keep_freed_memory
from gpt.interop.load import load
from gpt.training import budget, setup
from gpt.training.distillation import load_teachers
from gpt.training.loop import Trainer

COLUMNS = (
    "recipe", "parameters", "steps", "tokens/s", "seconds", "loss", "seconds to {loss:g}",
)  # fmt: skip
BASE = "as it is"
Figures = dict[str, Any]


def run(words: list[str], seed: int, *, seconds: float, evaluations: int) -> Figures:
    """A run in this process: parameters, steps, tokens/s, and the curve of seconds and losses."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--training.seed", str(seed), "--evaluation.windows", "0"]
        config = parse(TrainConfig, [*words, "--run_dir", folder], prog="speedrun.py")
        data = prepare(config.data, config.cache_dir)
        for field, value in (
            ("init", config.init),
            ("embeddings", config.embeddings),
            ("adapter.kind", config.adapter.kind != "none"),
        ):
            if value:
                raise UsageError(f"{field} is set, and speedrun.py compares runs of new weights")
        config = setup.resolve(config, data, None)
        teachers = load_teachers(config, data.tokenizer, functools.partial(load, trainable=True))
        seconds = seconds or 60 * config.training.max_minutes
        if seconds:
            enough = min(20, 0.1 * seconds)
            trainer = Trainer(budget.longest(config), data, teachers=teachers)
            step, _ = budget.measure(trainer, None, seconds=enough, most=seconds)
            del trainer
            gc.collect()
            steps = max(1, round(seconds / step))
            training = dataclasses.replace(config.training, max_steps=steps)
            config = dataclasses.replace(config, training=training)
        trainer = Trainer(config, data, teachers=teachers)
        last, spent, curve = config.training.max_steps, 0.0, []
        due = {round(last * n / evaluations) for n in range(1, evaluations + 1)}
        for n in range(1, last + 1):
            start = time.perf_counter()
            trainer.update()
            spent += time.perf_counter() - start
            if n in due:
                curve.append((spent, trainer.evaluate(None)))
    return {
        "parameters": trainer.model.parameter_count(),
        "steps": last,
        "tokens/s": last * config.training.batch_tokens / spent,
        "curve": curve,
    }


def in_a_process(words: list[str], seed: int, seconds: float, evaluations: int) -> Figures:
    """As :func:`run`."""
    own = ["--run", str(seed), "--seconds", str(seconds), "--evaluations", str(evaluations)]
    done = subprocess.run(
        [sys.executable, __file__, words[0], *own, "--", *words[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(f"{' '.join(words)}: {done.stderr}")
        raise SystemExit(done.returncode)
    figures: Figures = json.loads(done.stdout.rpartition("@")[2])
    return figures


def reached(curve: list[tuple[float, float]], loss: float) -> float | None:
    """The seconds to this loss, on the line between the evaluations before and after it."""
    before, higher = 0.0, math.inf
    for seconds, own in curve:
        if own <= loss:
            share = (higher - loss) / (higher - own) if higher < math.inf else 1.0
            return before + share * (seconds - before)
        before, higher = seconds, own
    return None


def spread(values: list[float], digits: int) -> str:
    """The mean, and half of the distance between the farthest two."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):,.{digits}f}" + (
        f" ± {half:.{digits}f}" if len(values) > 1 else ""
    )


def table(results: dict[str, dict[str, Figures]], loss: float) -> str:
    """Markdown, a row for each recipe."""
    rows = [tuple(column.format(loss=loss) for column in COLUMNS), ("---",) + ("--:",) * 6]
    for name, seeds in results.items():
        runs = list(seeds.values())
        times = [reached(each["curve"], loss) for each in runs]
        known = [seconds for seconds in times if seconds is not None]
        when = spread(known, 1) if known else "not reached"
        when += f" ({len(known)} of {len(runs)} seeds)" if 0 < len(known) < len(runs) else ""
        rows.append(
            (
                name,
                f"{runs[0]['parameters']:,}",
                f"{statistics.mean(each['steps'] for each in runs):,.0f}",
                f"{statistics.median(each['tokens/s'] for each in runs):,.0f}",
                spread([each["curve"][-1][0] for each in runs], 1),
                spread([each["curve"][-1][1] for each in runs], 4),
                when,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(results: dict[str, dict[str, Figures]], loss: float, path: Path) -> None:
    """The loss of each recipe by the seconds of training: mean and range of the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, seeds in results.items():
        curves = [each["curve"] for each in seeds.values()]
        turns = list(zip(*curves, strict=False))  # a run of few steps has fewer evaluations
        times, losses = ([[at[i] for at in turn] for turn in turns] for i in (0, 1))
        mean = [statistics.mean(each) for each in times]
        axes.plot(mean, [statistics.mean(each) for each in losses], marker=".", label=name)
        axes.fill_between(mean, list(map(min, losses)), list(map(max, losses)), alpha=0.2)
    axes.axhline(loss, color="grey", linewidth=0.7)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss on the whole held-out part, nats per token")
    axes.set_yscale("log")
    axes.grid(linewidth=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a TOML file of train.py")
    parser.add_argument("--seconds", type=float, default=0.0, help="of training in each run")
    parser.add_argument("--loss", type=float, default=1.886, help="to reach")
    parser.add_argument("--seeds", default="1,2,3", help="numbers, with commas between them")
    parser.add_argument("--evaluations", type=int, default=20, help="of each run")
    parser.add_argument("--row", action="append", default=[], help="NAME: OPTIONS of train.py")
    parser.add_argument("--json", type=Path, help="keeps what was measured")
    parser.add_argument("--png", type=Path, help="the picture of the curves")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments, common = parser.parse_args(words[:cut]), words[cut + 1 :]
    if arguments.run is not None:
        keep_freed_memory()
        options = {"seconds": arguments.seconds, "evaluations": arguments.evaluations}
        try:
            found = run([arguments.config, *common], arguments.run, **options)
        except UsageError as error:
            parser.exit(2, f"{error}\n")
        print("@", json.dumps(found))
        return
    if not Path(arguments.config).is_file():
        parser.error(f"{arguments.config} is not a file; it is a TOML file of train.py")
    if not re.fullmatch(r"\d+(,\d+)*", arguments.seeds):
        parser.error(f"--seeds is {arguments.seeds!r}, and must be numbers such as 1,2,3")
    if arguments.evaluations < 1 or arguments.seconds < 0:
        parser.error("--evaluations must be at least 1, and --seconds at least 0")
    rows = {BASE: []} | {
        name.strip(): shlex.split(own)
        for name, _, own in (row.partition(":") for row in arguments.row)
    }
    kept: dict[str, Figures] = {}
    if arguments.json is not None and arguments.json.exists():
        try:
            kept = json.loads(arguments.json.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--json {arguments.json} cannot be read: {error}")
    settings_of = Path(arguments.config).read_text(encoding="utf-8")
    results: dict[str, dict[str, Figures]] = {name: {} for name in rows}
    for seed in map(int, arguments.seeds.split(",")):
        for name, own in rows.items():
            settings = [arguments.config, *common, *own]
            key = json.dumps(
                [settings, settings_of, seed, arguments.seconds, arguments.evaluations, describe()]
            )
            if key not in kept:
                kept[key] = in_a_process(settings, seed, arguments.seconds, arguments.evaluations)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            results[name][str(seed)] = kept[key]
            print(f"{name}, seed {seed}: {kept[key]['curve'][-1][1]:.4f}", file=sys.stderr)
    print(describe(), end="\n\n")
    print(table(results, arguments.loss))
    if arguments.png is not None:
        draw(results, arguments.loss, arguments.png)


if __name__ == "__main__":
    main()
