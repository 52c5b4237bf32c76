"""What the pages of docs/ say of the code, and what draws them, agree with the code."""

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from gpt.config import ModelConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PICTURES = re.compile(r"\bmatplotlib\b")


def script(name):
    """A program of docs/, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tour():
    """The code cells of the notebook, by number."""
    cells = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) >= 8
    return dict(enumerate(sources, 1))


def walk(cells, capsys):
    scope = {"__name__": "tour"}
    for number, source in cells.items():
        exec(compile(source, f"cell {number} of tour.ipynb", "exec"), scope)
    said = capsys.readouterr().out
    assert "the kernel gives the same numbers" in said
    assert scope["losses"][-1] < 1 < 3 < scope["losses"][0]
    assert scope["difference"] < 1e-4


def test_the_tour_runs_without_its_pictures(capsys):
    walk({n: source for n, source in tour().items() if not PICTURES.search(source)}, capsys)


def test_the_tour_runs_with_its_pictures(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pyplot = pytest.importorskip(
        "matplotlib.pyplot", reason="the tour's pictures need the extra docs", exc_type=ImportError
    )
    walk(tour(), capsys)
    assert len(pyplot.get_fignums()) == sum(bool(PICTURES.search(s)) for s in tour().values()) >= 3
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()
    pyplot.close("all")


def test_the_steps_of_both_walks_are_functions_of_the_program():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    hops = re.findall(r"`(gpt/[\w/]+\.py)`(?: \|)? `([\w.]+)`", page)
    assert len(hops) >= 20
    for path, function in hops:
        found = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for name in function.split("."):
            kinds = (ast.FunctionDef, ast.ClassDef)
            inside = {node.name: node for node in found.body if isinstance(node, kinds)}
            assert name in inside, (path, function)
            found = inside[name]


def test_the_page_of_options_is_what_the_program_writes():
    written = script("options").page()
    shown = (DOCS / "options.md").read_text(encoding="utf-8")
    assert shown == written, "run `python docs/options.py`"
    for option in ("`--optimizer.muon_learning_rate`", "`--top_k`", "`--stride`", "`models`"):
        assert option in shown


def test_the_pictures_are_drawn_from_a_run_and_need_no_other_file(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for path in (ROOT / "tests" / "checkpoints" / "format-1").iterdir():
        (run / path.name).symlink_to(path)
    records = [{"step": n, "loss": 4.0 - n / 100} for n in range(10, 60, 10)]
    records += [{"step": 50, "validation_loss": 3.6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    script("pictures").draw(run, tmp_path)
    for folder in (tmp_path, DOCS):
        for name, words in (("training", "step"), ("explained", "nats")):
            picture = (folder / f"{name}.svg").read_text(encoding="utf-8")
            assert words in "".join(ElementTree.fromstring(picture).itertext())
            assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture
def techniques(monkeypatch):
    """The program that compares them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("techniques")


def test_each_technique_has_a_file_a_paragraph_and_code(techniques):
    found = techniques.techniques()
    assert [each.name for each in found] != sorted(each.name for each in found)
    for each in found:
        assert each.line > 0
        assert each.paper
        assert (each.switch == "") == (each.name == techniques.BASE)


def test_the_page_of_techniques_names_every_switch_of_the_model():
    page = (DOCS / "techniques.md").read_text(encoding="utf-8")
    sizes = {"vocab_size", "context_length", "n_layer", "norm_eps"}
    for field in dataclasses.fields(ModelConfig):
        assert field.name in sizes or re.search(rf"`{field.name}\b", page), field.name
    for field in ("position", "rotary_scaling", "norm", "norm_placement", "mlp", "activation",
                  "initial", "copy", "moe_balance", "moe_score"):  # fmt: skip
        for choice in get_args(ModelConfig.__dataclass_fields__[field].type):
            assert choice == "none" or f'"{choice}"' in page, (field, choice)


def test_the_table_of_techniques_has_the_lines_of_the_code(techniques):
    page = (DOCS / "techniques.md").read_text(encoding="utf-8").partition(techniques.BEGIN)[2]
    lines = {each.name: f"`{each.path}:{each.line}`" for each in techniques.techniques()}
    rows = re.findall(r"^\| (\w+) \|.*\| (`gpt/[^`]*`) \|", page, re.MULTILINE)
    assert {name for name, _ in rows} == set(lines)  # none is left out
    for name, line in rows:
        assert line == lines[name], "run `python benchmarks/techniques.py --draw`"


def test_techniques_that_were_measured_fill_the_page_and_a_picture(
    techniques, tmp_path, monkeypatch
):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib", reason="the extra docs draws it", exc_type=ImportError)
    page, picture = tmp_path / "page.md", tmp_path / "page.svg"
    page.write_text((DOCS / "techniques.md").read_text(encoding="utf-8") + "\nThe end.\n")
    monkeypatch.setattr(techniques, "PAGE", page)
    monkeypatch.setattr(techniques, "PICTURE", picture)
    seeds = {
        seed: {"parameters": 9000, "loss": 2 + loss, "trains": 10.4, "decodes": 7.6}
        for seed, loss in (("1", 0.1), ("2", 0.4))
    }
    runs = {name: {"made_of": [], "seeds": seeds} for name in ("multi_query", "gpt2")}
    for _ in range(2):  # what was there before is replaced
        techniques.write({"machine": "a machine", "runs": runs})
    first, filled = page.read_text(encoding="utf-8").split(techniques.BEGIN)
    assert first == (DOCS / "techniques.md").read_text(encoding="utf-8").split(techniques.BEGIN)[0]
    table = filled.partition(techniques.END)[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| gpt2", "| multi_query"]
    assert "| `n_kv_head = 1` | arXiv:1911.02150 |" in rows[3]
    assert rows[3].endswith("| 9,000 | 2.250 ± 0.150 | 10 | 8 | 1,024 |")
    assert filled.endswith("\nThe end.\n")
    assert "multi query" in "".join(ElementTree.parse(picture).getroot().itertext())


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_no_page_has_a_gap_to_be_filled(page):
    assert "@@" not in page.read_text(encoding="utf-8")
