"""Training on instructions: the loss of the answers, packing that changes nothing, and answers that
are learned.
"""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from gpt.cli import main
from gpt.data.example_windows import ExampleWindows
from gpt.data.examples import Example, load_examples, save_examples
from gpt.evaluation.answers import Answer, figures
from gpt.generation.examples import ExampleEncoder
from gpt.interop.families import family_for
from gpt.interop.huggingface import load_folder
from gpt.interop.weights import layout
from gpt.training.run import train
from gpt.training.source import next_token
from tests.tiny import change, tiny_run


@pytest.fixture
def sums(tmp_path):
    records = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(60)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def windows_of(folder, tokens, counted, context):
    save_examples(folder, [Example(t, c) for t, c in zip(tokens, counted, strict=True)])
    return ExampleWindows(load_examples(folder, b""), context, too_long="cut")


def test_the_loss_and_gradients_are_those_of_transformers_with_masked_labels(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=2,
                   resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ).double()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_folder(tmp_path / "theirs", dtype=torch.float64)
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 61, n).astype(np.uint32) for n in (9, 17, 5, 12)]
    counted = [generator.random(len(t)) < 0.5 for t in tokens]
    windows = windows_of(tmp_path, tokens, counted, 32)
    batch = windows.batch(np.arange(len(windows)))
    assert len(windows) < len(tokens)

    loss = next_token(
        lambda tokens, documents, read: ours(tokens, documents=documents, read=read), batch
    )
    loss.backward()
    their_loss = torch.zeros((), dtype=torch.float64)
    for ids, counts in zip(tokens, counted, strict=True):
        ids = torch.from_numpy(ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(counts), ids, -100)
        n = int((labels[:, 1:] != -100).sum())
        their_loss = their_loss + n * theirs(ids, labels=labels).loss
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)  # the loss is in float32
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for name, held in layout(family_for(ours.config, "gpt2"), ours).items():
        for rows in held:
            own = ours.get_parameter(rows.parameter).grad[rows.ours]
            theirs_too = wanted[name].T if rows.part.turn else wanted[name]
            torch.testing.assert_close(own, theirs_too[rows.theirs], rtol=1e-5, atol=1e-6)


def test_a_run_learns_only_answers_and_resumes_bit_for_bit(sums, tmp_path):
    settings = {"model": {"dropout": 0.1}, "optimizer": {"schedule": "constant"}}
    config, output = tiny_run(tmp_path, sums, **settings), io.StringIO()
    train(config, console=Console(file=output, width=200), encoder=ExampleEncoder)
    assert "examples in" in output.getvalue()
    weights = next((tmp_path / "run" / "checkpoints").glob("*12/model.safetensors")).read_bytes()

    other = tmp_path / "other"
    halves = tiny_run(other, sums, **settings)
    for part in (
        change(halves, training={"max_steps": 4}),
        dataclasses.replace(halves, resume=True),
    ):
        train(part, console=Console(quiet=True), encoder=ExampleEncoder)
    again = next((other / "run" / "checkpoints").glob("*12/model.safetensors")).read_bytes()
    assert again == weights


def test_answers_to_held_out_questions_are_shown_and_scored(sums, tmp_path, capsys):
    words = [f"--data.source={sums}", f"--run_dir={tmp_path / 'run'}", "--data.tokenizer=char",
             "--model.context_length=16", "--model.n_layer=1", "--model.n_head=2",
             "--model.n_embd=32", "--training.max_steps=2", "--training.batch_tokens=64",
             "--training.micro_batch_size=4", "--evaluation.answers=2"]  # fmt: skip
    assert main(["train", *words]) == 0
    output = capsys.readouterr().out
    assert "reference: " in output
    assert "answer:    " in output
    assert ", exact match 0" in output
    records = records_of(tmp_path / "run")
    assert {"exact_match", "bleu"} <= set([r for r in records if "validation_loss" in r][-1])


def test_a_mixture_shows_the_answers_of_its_instructions(sums, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("1 and 2 and 3\n" * 40)
    (tmp_path / "mix.toml").write_text(
        f'[[data.mixture]]\nsource = "{tmp_path / "text.txt"}"\n'
        f'[[data.mixture]]\nsource = "{sums}"\n'
    )
    start = tmp_path / "start"
    shape = ["--model.context_length=16", "--model.n_layer=1", "--model.n_head=2",
             "--model.n_embd=32", "--training.max_steps=1", "--training.batch_tokens=64",
             "--training.micro_batch_size=4"]  # fmt: skip
    text = ["--data.tokenizer=byte", f"--data.source={tmp_path / 'text.txt'}"]
    assert main(["train", f"--run_dir={start}", *text, *shape]) == 0
    words = [str(tmp_path / "mix.toml"), f"--run_dir={tmp_path / 'run'}", f"--init={start}"]
    assert main(["train", *words, *shape, "--evaluation.answers=2"]) == 0
    output = capsys.readouterr().out
    assert "reference: " in output
    assert "exact_match" in [r for r in records_of(tmp_path / "run") if "validation_loss" in r][-1]


def test_the_figures_of_answers_are_exact_matches_and_the_corpus_bleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    pairs = [
        ("the cat sat on the mat", " the cat sat on the mat\n"),
        ("a dog ran in the thick fog", "a dog sat in the fog"),
    ]
    answers = [Answer("?", reference, answer) for reference, answer in pairs]
    found = figures(answers)
    references, texts = zip(*pairs, strict=True)
    assert found["exact_match"] == 0.5
    assert found["bleu"] == sacrebleu.corpus_bleu(list(texts), [list(references)]).score > 10
    assert figures(answers[1:])["exact_match"] == 0


@pytest.mark.slow
def test_a_tiny_model_learns_a_task_from_200_instructions(tmp_path, capsys):
    """Reversing the case of three letters: 95 % of the held-out answers are exact."""
    generator = np.random.default_rng(1)
    letters = list("abcdefghABCDEFGH")
    texts = sorted({"".join(generator.choice(letters, 3)) for _ in range(260)})[:250]
    path = tmp_path / "case.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{text}>", "completion": text.swapcase()}) + "\n"
            for text in texts
        )
    )
    words = [f"--data.source={path}", f"--run_dir={tmp_path / 'run'}", "--data.tokenizer=char",
             "--data.validation_fraction=0.2", "--model.context_length=64", "--model.n_layer=2",
             "--model.n_head=4", "--model.n_embd=64", "--model.position=rotary",
             "--training.max_steps=500", "--training.batch_tokens=1024",
             "--training.micro_batch_size=16", "--optimizer.learning_rate=3e-3",
             "--evaluation.every=250", "--evaluation.answers=100"]  # fmt: skip
    assert main(["train", *words]) == 0
    records = records_of(tmp_path / "run")
    assert [r for r in records if "exact_match" in r][-1]["exact_match"] > 0.95
