"""Several models that are scored together, and the text that runs have held out."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from gpt.cli import main
from gpt.config import EvaluateConfig, UsageError
from gpt.data.prepare import prepare
from gpt.data.tokenizer import ByteTokenizer
from gpt.evaluation.perplexity import ensemble, score_text
from gpt.interop.load import load
from gpt.training.run import train
from tests.conftest import make_model
from tests.tiny import change, tiny_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of other seeds on one text, and what the last evaluation of each said."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}.\n" for n in range(400)))
    base = tiny_run(
        folder, text, training={"max_steps": 4}, evaluation={"windows": 0, "sample_tokens": 0}
    )
    found = []
    for seed in (1, 2):
        config = change(base, training={"seed": seed})
        config = dataclasses.replace(config, run_dir=str(folder / f"run-{seed}"))
        result = train(config, console=Console(file=io.StringIO()))
        found.append((config, result.best_loss))
    return found


def score(model, ids, **options):
    return score_text(model, ByteTokenizer(), ids, keep=True, **options)


@pytest.mark.parametrize("stride", [3, 16])
def test_an_ensemble_averages_the_probabilities_of_each_token(stride, tiny_config):
    ids = np.random.default_rng(0).integers(0, 61, 70).astype(np.uint32)
    models = [make_model(tiny_config, seed=seed, dtype=torch.float64) for seed in (1, 2, 3)]
    scores = [score(model, ids, stride=stride) for model in models]
    together = ensemble(scores)
    expected = -np.log(np.mean([np.exp(-each.nats) for each in scores], axis=0))
    np.testing.assert_allclose(together.nats, expected)
    assert together.loss == pytest.approx(expected.mean())
    assert together.loss < np.mean([each.loss for each in scores])
    assert together.by_position.sum(1) == pytest.approx([expected.sum(), 69])
    assert together.losses.sum() == pytest.approx(expected.sum())
    for each in scores:
        assert each.nats.sum() == pytest.approx(each.losses.sum())
        same = ensemble([each, each])
        np.testing.assert_allclose(same.losses, each.losses)
        np.testing.assert_allclose(same.by_position, each.by_position)


def test_models_on_other_windows_are_no_ensemble(tiny_config):
    ids = np.random.default_rng(0).integers(0, 61, 70).astype(np.uint32)
    model = make_model(tiny_config)
    with pytest.raises(UsageError, match="not scored on the same windows"):
        ensemble([score(model, ids, stride=3), score(model, ids, stride=4)])


def test_the_held_out_text_of_runs_gives_their_validation_loss(runs, capsys):
    names = [str(config.run) for config, _ in runs]
    words = ["evaluate", *names, "--ensemble", "--json", "--weights", "float32", "--device", "cpu"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)["scores"]
    losses = []
    for config, best in runs:
        data = prepare(config.data, config.cache_dir)
        loaded = load(config.run, weights="float32")
        ids = data.validation.read(0, len(data.validation))
        expected = score_text(loaded.model, loaded.tokenizer, ids, stride=16)
        own = report[str(config.run)]["held-out text"]["nats/token"]["value"]
        assert own == pytest.approx(expected.loss, rel=1e-5)
        assert own == pytest.approx(best, rel=0.02)  # which lacks the last part of a window
        losses.append(own)
    together = report["ensemble of 2"]["held-out text"]["nats/token"]["value"]
    assert together < np.mean(losses)
    assert main([*words[:4], "--text", runs[0][0].data.source]) == 0
    assert "ensemble of 2" in capsys.readouterr().out


def test_an_ensemble_is_shown_beside_a_paired_comparison(runs, capsys):
    words = ["evaluate", *(str(config.run) for config, _ in runs[:2]), "--ensemble", "--paired"]
    words += ["--text", str(runs[0][0].data.source), "--weights", "float32", "--device", "cpu"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "ensemble of 2" in output
    assert "nats/token, 95 % from" in output


def test_held_out_text_needs_runs_on_one_text(runs, tmp_path, capsys):
    one = str(runs[0][0].run)
    other = tiny_run(tmp_path, runs[0][0].data.source, training={"max_steps": 1})
    other = change(other, data={"validation_fraction": 0.3}, evaluation={"sample_tokens": 0})
    train(other, console=Console(file=io.StringIO()))
    assert main(["evaluate", one, str(other.run), "--held_out"]) == 2
    assert "have held out other tokens" in capsys.readouterr().err
    assert main(["evaluate", one, str(tmp_path), "--held_out"]) == 2
    assert "is not the folder of one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"models": ("a",), "ensemble": True}, "give two or more models"),
        ({"models": ("a",), "held_out": True, "text": "b"}, "text and held_out are both given"),
        ({"models": ("a",)}, "give text, held_out, lambada, hellaswag or choices"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        EvaluateConfig(**fields)
