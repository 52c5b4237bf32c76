"""gpt report: one page about runs, from what they recorded."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt.cli import main
from gpt.commands.run_data import read_runs
from gpt.config import to_toml
from tests.tiny import tiny_run

pytest.importorskip("matplotlib", reason="needs the extra report")
RUN = Path(__file__).parent.parent / "checkpoints" / "format-1"


def make_run(folder, *, rate=1000.0, loss=4.0, **groups):
    """A run's folder with the records of 40 steps."""
    folder.mkdir(parents=True)
    records = [{"step": 0, "validation_loss": 4.2, "bits_per_byte": 6.0, "sample": "<b>first</b>"}]
    for step in range(1, 41):
        records.append(
            {
                "step": step, "loss": loss - step / 40, "learning_rate": 1e-3 * step / 40,
                "gradient_norm": 1 / step, "tokens": 100 * step, "tokens_per_second": rate,
                "epoch": step / 100, "forward_seconds": 0.03, "backward_seconds": 0.06,
                "data_seconds": 0.0, "optimizer_seconds": 0.01,
            }
        )  # fmt: skip
    records.append({"step": 40, "validation_loss": 3.1, "bits_per_byte": 4.5, "sample": "last"})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 41, "lo')  # the last line was cut
    config = tiny_run(folder, "text.txt", **groups)
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "machine.json").write_text(json.dumps({"processor": "A & B", "memory": "8 GB"}))
    return folder


class Tags(HTMLParser):
    """The tags of a page, balanced, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links, self.ids = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        names = dict(attributes)
        self.links += [names[n] for n in ("src", "href", "xlink:href") if n in names]
        self.ids += [names["id"]] if "id" in names else []
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(tmp_path, *words):
    out = tmp_path / "report.html"
    assert main(["report", *map(str, words), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_has_all_of_a_run_and_needs_nothing_else(tmp_path):
    text = page_of(tmp_path, make_run(tmp_path / "one"))
    tags = Tags(text)
    assert not tags.open
    assert all(link.startswith("#") for link in tags.links)
    assert len(set(tags.ids)) == len(tags.ids)
    assert "script" not in tags.seen
    for title in (
        "training loss", "validation loss", "bits per byte", "learning rate", "gradient norm",
        "tokens per second", "milliseconds of a step, by part",
    ):  # fmt: skip
        assert f"<figcaption>{title}" in text, title
    assert "3.1000 at step 40" in text
    assert "A &amp; B" in text
    assert "&lt;b&gt;first" in text
    assert "<pre>last</pre>" in text
    assert "4,000" in text  # tokens seen
    assert "<td>0:00:04</td>" in text  # 4,000 tokens at 1,000 a second
    assert tags.seen.count("svg") == 6 * 3 + 1


def test_runs_lie_over_each_other_and_their_settings_are_compared(tmp_path):
    one = make_run(tmp_path / "one", optimizer={"learning_rate": 1e-3})
    two = make_run(tmp_path / "two", loss=5.0, optimizer={"learning_rate": 2e-3})
    text = page_of(tmp_path, one, two, "--x", "tokens")
    differing = text[text.index("What differs") : text.index("All settings")]
    assert "optimizer.learning_rate" in differing
    assert "0.002" in differing
    assert "model.n_layer" not in differing
    assert "model.n_layer" in text
    assert re.search(r'id="x-tokens" checked', text)
    first = text[text.index("<figure>") : text.index("</figure>")]
    assert {"one", "two"} <= set(re.findall(r">\s*(one|two)\s*<", first))


def test_the_same_runs_give_the_same_page(tmp_path):
    run = make_run(tmp_path / "one")
    assert page_of(tmp_path, run) == page_of(tmp_path, run)


def test_the_picture_is_a_png(tmp_path):
    run = make_run(tmp_path / "one")
    page_of(tmp_path, run, "--png", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_time_is_counted_from_the_steps_own_figures(tmp_path):
    fast = make_run(tmp_path / "fast", rate=2000.0)
    slow = make_run(tmp_path / "slow", rate=1000.0)
    [one, two] = read_runs([str(fast), str(slow / "metrics.jsonl")])
    assert one.steps[-1]["seconds"] == pytest.approx(2.0)
    assert two.steps[-1]["seconds"] == pytest.approx(4.0)
    assert two.evaluations[-1]["seconds"] == pytest.approx(4.0)
    assert two.evaluations[0]["seconds"] == 0


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [str(make_run(tmp_path / a / "run")) for a in ("x", "y")]
    assert [run.name for run in read_runs(paths)] == paths


def test_a_text_under_a_model_is_its_heat_map(tmp_path):
    (tmp_path / "text.txt").write_text("ROMEO:\nBut soft")
    text = page_of(tmp_path, RUN, "--text", tmp_path / "text.txt", "--device", "cpu")
    assert "text.txt under" in text
    assert text.count("<table>") >= 14  # one for each token


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "runs is empty"),
        (["nothing"], "nothing has no records of a run"),
        (["RUN", "--out", "report.txt"], "must be an .html file"),
        (["RUN", "--png", "curves.jpg"], "must be a .png file"),
        (["RUN", "RUN", "--text", "a.txt"], "text is shown under one model"),
        (["EMPTY"], "has no records of steps"),
    ],
)
def test_mistakes_are_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    named = {"RUN": str(run), "EMPTY": "empty"}
    assert main(["report", *(named.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "gpt.commands.curves", raising=False)
    monkeypatch.delattr("gpt.commands.curves", raising=False)  # imported by an earlier test
    assert main(["report", str(run), "--out", str(tmp_path / "a.html")]) == 2
    assert "pip install 'gpt[report]'" in capsys.readouterr().err
