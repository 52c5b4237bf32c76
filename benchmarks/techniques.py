"""Each technique of the model beside GPT-2's stack: ``python benchmarks/techniques.py``.

It trains every file of ``configs/techniques/`` on Shakespeare with three seeds, and keeps what it
measured in ``techniques.json`` after each run. When it is stopped and started again, it continues
after the last run. Then it writes the table of ``docs/techniques.md`` and its picture. ``--only
alibi,rotary`` trains a part, ``--seeds 1,2`` takes other seeds, ``--source FILE`` another text, and
``--draw`` trains nothing. ``--losses`` measures no speed: it can run beside other work.
If the file, the text or the number of steps of a technique has changed, it is trained again.

The first lines of a technique's file say what it does, its paper and its code. Its switch is the
fields that differ from ``gpt2.toml``. The rows are in the order of the page's sections.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe, seconds

from gpt import KVCache, generate, load
from gpt.cli import main as gpt
from gpt.config import ModelConfig, TrainConfig, parse

ROOT = Path(__file__).parent.parent
FILES = ROOT / "configs" / "techniques"
RESULTS = Path(__file__).with_suffix(".json")
PAGE, PICTURE = (ROOT / "docs" / f"techniques.{suffix}" for suffix in ("md", "svg"))
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
BASE, SEEDS = "gpt2", "1,2,3"
PROMPT = "ROMEO:"
CONTEXT = 1024
"""Tokens that the cache is measured for."""
HEAD = re.compile(r"# (.*)\.\n# Paper: (.*)\. Code: (\S+) (\S+)\.\n")
COLUMNS = (
    "technique", "switch", "paper", "code", "parameters", "loss", "trains, tokens/s",
    "decodes, tokens/s", "cache, bytes/token",
)  # fmt: skip
Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Technique:
    """A file of ``configs/techniques/``."""

    name: str
    meaning: str
    paper: str
    path: str
    symbol: str

    @classmethod
    @functools.cache
    def read(cls, name: str) -> "Technique":
        found = HEAD.match((FILES / f"{name}.toml").read_text(encoding="utf-8"))
        assert found is not None, f"{name}.toml does not begin with its meaning, paper and code"
        return cls(name, *found.groups())

    @functools.cached_property
    def config(self) -> TrainConfig:
        return parse(TrainConfig, [str(FILES / f"{self.name}.toml")], prog="techniques.py")

    @property
    def switch(self) -> str:
        """The fields that differ from the base's."""
        base, mine = (dataclasses.asdict(t.config.model) for t in (Technique.read(BASE), self))
        return "<br>".join(
            f"`{name} = {json.dumps(value)}`" for name, value in mine.items() if value != base[name]
        )

    @property
    def line(self) -> int:
        """Where its code begins."""
        body = ast.parse((ROOT / self.path).read_text(encoding="utf-8")).body
        for name in self.symbol.split("."):
            found = next(node for node in body if name in names_of(node))
            body = getattr(found, "body", [])
        return found.lineno


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [node.target.id] if isinstance(node, ast.AnnAssign) else []


def techniques() -> list[Technique]:
    """All, the base first and the others in the order in which the page names their files."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[0]
    order = list(dict.fromkeys(re.findall(r"`(\w+)\.toml`", text)))
    there = {path.stem for path in FILES.glob("*.toml")}
    assert set(order) == there, f"docs/techniques.md and configs/techniques: {set(order) ^ there}"
    return [Technique.read(name) for name in order]


def train(technique: Technique, seed: int, words: list[str], run: Path) -> None:
    """A run of the technique in the folder ``run``, made by the program's own command."""
    words = [
        str(FILES / f"{technique.name}.toml"), "--run_dir", str(run), "--training.seed", str(seed),
        "--evaluation.sample_tokens", "0", *words,
    ]  # fmt: skip
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = gpt(["train", *words])
    if status:
        raise SystemExit(f"{technique.name}, seed {seed}: status {status}\n{said.getvalue()}")


def measure(technique: Technique, seed: int, words: list[str], *, speeds: bool) -> dict[str, float]:
    """A run's parameters and its loss on held-out text; with ``speeds`` also the tokens/s of
    training and decoding.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        train(technique, seed, words, run)
        records = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
        model = load(run, weights="float32")
    figures = {
        "parameters": model.model.parameter_count(),
        "loss": [r["validation_loss"] for r in records if "validation_loss" in r][-1],
    }
    if not speeds:
        return figures
    n = model.model.config.context_length - len(PROMPT)
    options = {"temperature": 0, "max_new_tokens": n, "ban": (model.tokenizer.end_of_text,)}
    decode = functools.partial(generate, model, PROMPT, **options)
    decode()
    times = [seconds(decode) for _ in range(5)]
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return figures | {"trains": statistics.median(rates), "decodes": n / statistics.median(times)}


def cache_bytes(config: ModelConfig) -> float:
    """Of a token, in a cache for ``CONTEXT`` tokens of float32."""
    config = dataclasses.replace(config, context_length=CONTEXT)
    cache = KVCache(
        config, batch_size=1, capacity=CONTEXT, dtype=torch.float32, device=torch.device("meta")
    )
    return cache.nbytes / CONTEXT


def run_all(
    chosen: list[Technique], numbers: list[int], words: list[str], results: Results, *, speeds: bool
) -> None:
    """Every run that is not in the results yet, first all techniques with the first seed."""
    results["machine"], runs = describe(), results.setdefault("runs", {})
    with tempfile.TemporaryDirectory() as data:
        for seed, technique in itertools.product(numbers, chosen):
            made_of = [hashlib.sha256(repr(technique.config).encode()).hexdigest(), *words]
            record = runs.setdefault(technique.name, {"made_of": made_of, "seeds": {}})
            if record["made_of"] != made_of:
                record = runs[technique.name] = {"made_of": made_of, "seeds": {}}
            if str(seed) not in record["seeds"]:
                figures = measure(
                    technique, seed, ["--data.cache_dir", data, *words], speeds=speeds
                )
                record["seeds"][str(seed)] = figures
                print(f"{technique.name:20} seed {seed}: {figures}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")


def seeds(results: Results, name: str, figure: str) -> list[float]:
    """A figure of each seed for which it was measured."""
    of_seeds = results["runs"][name]["seeds"].values()
    return [figures[figure] for figures in of_seeds if figure in figures]


def table(measured: list[Technique], results: Results) -> str:
    """Markdown; a loss is the mean over the seeds, and half of the distance between the farthest
    two.
    """
    rows = [COLUMNS, ("---",) * 4 + ("--:",) * 5]
    for each in measured:
        losses = seeds(results, each.name, "loss")
        rows.append(
            (
                each.name,
                each.switch or "GPT-2's defaults",
                each.paper,
                f"`{each.path}:{each.line}`",
                f"{seeds(results, each.name, 'parameters')[0]:,}",
                f"{statistics.mean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}",
                f"{statistics.median(seeds(results, each.name, 'trains')):,.0f}",
                f"{statistics.median(seeds(results, each.name, 'decodes')):,.0f}",
                f"{cache_bytes(each.config.model):,.0f}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(measured: list[Technique], results: Results) -> None:
    """The losses as dots with their ranges, and the speeds of training as bars."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gpt", "font.size": 8}
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(8, 0.9 + 0.17 * len(measured)), width_ratios=(2, 1),
        layout="constrained",
    )  # fmt: skip
    for at, each in enumerate(measured):
        losses = seeds(results, each.name, "loss")
        color = "C1" if each.name == BASE else "C0"
        left.plot([min(losses), max(losses)], [at, at], color=color)
        left.plot(statistics.mean(losses), at, "o", color=color, markersize=4)
        right.barh(at, statistics.median(seeds(results, each.name, "trains")), color=color)
    if measured[0].name == BASE:
        left.axvline(statistics.mean(seeds(results, BASE, "loss")), color="C1", linewidth=0.5)
    left.set_yticks(range(len(measured)), [each.name.replace("_", " ") for each in measured])
    left.invert_yaxis()
    left.set_xlabel("loss on held-out text, nats per character")
    right.set_xlabel("training, tokens/s")
    for axes in (left, right):
        axes.grid(axis="x", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def write(results: Results) -> None:
    """Fill the page between its markers, and draw its picture."""
    measured = [each for each in techniques() if each.name in results["runs"]]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    n = max(len(seeds(results, each.name, "loss")) for each in measured)
    said = f"Measured on {results['machine']}, with up to {n} seeds."
    picture = f"![The loss and the training speed of each technique]({PICTURE.name})"
    filled = f"{BEGIN}\n{said}\n\n{table(measured, results)}\n\n{picture}\n{END}"
    PAGE.write_text(before + filled + after, encoding="utf-8")
    draw(measured, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="these techniques, with commas between them")
    parser.add_argument("--seeds", default=SEEDS, help="numbers, with commas between them")
    parser.add_argument("--losses", action="store_true", help="measure no speed")
    parser.add_argument("--source", default="", help="a text in the place of the embedded plays")
    parser.add_argument("--steps", type=int, help="of each run, in the place of its file's")
    parser.add_argument("--draw", action="store_true", help="only write the table and the picture")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    words = ["--data.source", arguments.source] if arguments.source else []
    if arguments.steps:
        steps = str(arguments.steps)
        words += ["--training.max_steps", steps, "--evaluation.every", steps]
    only = [name for name in arguments.only.split(",") if name]
    if not arguments.draw:
        chosen = [t for t in techniques() if not only or t.name in only]
        numbers = [int(seed) for seed in arguments.seeds.split(",")]
        run_all(chosen, numbers, words, results, speeds=not arguments.losses)
    if not results:
        parser.error(f"{RESULTS.name} has no results to draw: run without --draw")
    write(results)


if __name__ == "__main__":
    main()
