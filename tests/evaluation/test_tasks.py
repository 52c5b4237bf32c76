import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

import gpt
from gpt.cli import main
from gpt.config import EvaluateConfig, ModelConfig, UsageError, foreign
from gpt.data.corpus import open_corpus
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer
from gpt.evaluation.likelihood import Request, encode_pair, likelihoods
from gpt.evaluation.perplexity import encode_text, score_text
from gpt.evaluation.report import as_table, measure
from gpt.evaluation.tasks import hellaswag, lambada, multiple_choice, read_jsonl
from gpt.interop.export import export_huggingface
from gpt.interop.huggingface import load_folder
from gpt.interop.packed import save_packed
from tests.conftest import make_model
from tests.data.test_piped import piped


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A random GPT-2 of transformers, and the same in this project."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=48, n_layer=2, n_head=2, n_embd=32, eos_token_id=256
    )
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return load_folder(folder), theirs


@torch.inference_mode()
def by_hugging_face(theirs, context, continuation):
    """(log-probability, greedy?) of one continuation, alone."""
    ids = [*context, *continuation][-(theirs.config.n_positions + 1) :]
    n = len(continuation)
    scores = theirs(torch.tensor([ids[:-1]])).logits[0, -n:].double().log_softmax(-1)
    targets = torch.tensor(list(continuation))
    total = scores.gather(-1, targets[:, None]).sum().item()
    return total, bool((scores.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_in_ragged_batches_are_hugging_faces_one_by_one(both, batch_size):
    ours, theirs = both
    texts = [
        ("a", " b"),
        ("longer context here", "x"),
        ("", "start"),
        ("q " * 60, "the end"),
        ("z", "y"),
    ]
    requests = [encode_pair(ByteTokenizer(), *text) for text in texts]
    got = likelihoods(ours, requests, batch_size=batch_size)
    for request, score in zip(requests, got, strict=True):
        total, greedy = by_hugging_face(theirs, request.context, request.continuation)
        assert score.total == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy


def test_greedy_continuations_are_recognised(both):
    ours, _ = both
    context, made = list(b"some"), []
    for _ in range(3):
        made.append(int(ours(torch.tensor([context + made]))[0, -1].argmax()))
    [good, bad] = likelihoods(ours, [Request(context, made), Request(context, [*made[:2], 1])])
    assert good.is_greedy
    assert not bad.is_greedy


def test_white_space_goes_to_the_continuation_and_nothing_is_the_start_of_a_document():
    request = encode_pair(ByteTokenizer(), "ab  ", "c")
    assert (request.context, request.continuation) == (list(b"ab"), list(b"  c"))
    assert encode_pair(ByteTokenizer(), "", "c").context == [256]


@pytest.mark.parametrize("continuation", [[], [1] * 49])
def test_a_continuation_that_cannot_be_scored_is_refused(both, continuation):
    with pytest.raises(UsageError, match=f"has {len(continuation)} tokens, and must have from 1"):
        likelihoods(both[0], [Request([1], continuation)])


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_lambada_is_scored_on_its_last_word(both, tmp_path):
    ours, theirs = both
    texts = ["the cat sat on the mat", "who would have thought that", "one two three"]
    metrics = lambada(
        ours, ByteTokenizer(), write(tmp_path / "l.jsonl", [{"text": t} for t in texts])
    )
    expected = []
    for text in texts:
        context, word = text.rsplit(" ", 1)
        expected.append(by_hugging_face(theirs, context.encode(), b" " + word.encode()))
    mean = -sum(total for total, _ in expected) / 3
    assert metrics["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-3)
    assert metrics["acc"].value == sum(greedy for _, greedy in expected) / 3


def test_hellaswag_takes_the_likeliest_ending_also_by_length(both, tmp_path):
    ours, theirs = both
    endings = ["goes on [header] and on, for a very long time indeed.", "stops.", "sits", "is it?"]
    item = {
        "activity_label": "Running",
        "ctx_a": "A man [title] runs.",
        "ctx_b": "the man",
        "endings": endings,
    }
    context = "Running: A man.  runs. The man".replace("  ", " ")
    clean = ["goes on and on, for a very long time indeed.", *endings[1:]]
    totals = [by_hugging_face(theirs, context.encode(), f" {e}".encode())[0] for e in clean]
    best = totals.index(max(totals))
    by_length = [t / len(e) for t, e in zip(totals, clean, strict=True)]
    best_by_length = by_length.index(max(by_length))
    assert best != best_by_length  # or the test would not tell the two apart
    for label, acc, acc_norm in ((best, 1, 0), (best_by_length, 0, 1)):
        path = write(tmp_path / "h.jsonl", [item | {"label": label}])
        metrics = hellaswag(ours, ByteTokenizer(), path)
        assert (metrics["acc"].value, metrics["acc_norm"].value) == (acc, acc_norm)


def test_choices_are_scored_like_hellaswags_endings(both, tmp_path):
    ours, theirs = both
    items = [
        {"context": f"question {i}:", "choices": ["yes", "no", "who knows"], "answer": i % 3}
        for i in range(9)
    ]
    metrics = multiple_choice(ours, ByteTokenizer(), write(tmp_path / "c.jsonl", items))
    hits = []
    for item in items:
        pairs = [(item["context"].encode(), f" {c}".encode()) for c in item["choices"]]
        totals = [by_hugging_face(theirs, *pair)[0] for pair in pairs]
        hits.append(totals.index(max(totals)) == item["answer"])
    p = sum(hits) / 9
    assert metrics["acc"].value == p
    assert metrics["acc"].standard_error == pytest.approx(math.sqrt(p * (1 - p) / 8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{', "line 2 is not JSON"),
        ('{"text": "a"}\n\n{"txt": 1}', "line 3 has no 'text'"),
        ("[1]", "line 1 has no 'text'"),
        (
            '{"text": "a"}\n{"text": "\\ud800"}',
            "line 2 is not JSON: it contains half of a surrogate",
        ),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 1 cannot be read: Exceeds the limit"),
        ('{"text": ' + "[" * 10_000, "line 1 cannot be read: it is nested too deeply"),
        ("\n", "has no items"),
        (b"\xff", "is not UTF-8 text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_broken_file_is_told_by_its_line(content, said, tmp_path):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said):
        read_jsonl(path, {"text": str})


HELLASWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "0"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": 7}, "item 1 has the answer 7 and 2 choices"),
        ({"label": ""}, "item 1 has the answer -1 and 2 choices"),
        ({"label": "9" * 5000}, "item 1 has the answer -1 and 2 choices"),
        ({"ctx_b": None}, "line 1 has None as its 'ctx_b', which must be a string"),
        ({"endings": "de"}, "line 1 has 'de' as its 'endings', which must be a list"),
        ({"endings": ["d", 3]}, "item 1 has the choices .'d', 3., which must be texts"),
        ({"endings": ["d", "[x]"]}, "item 1 has the choices .*, which must be texts"),
    ],
    ids=str,
)
def test_an_item_of_hellaswag_that_cannot_be_scored_is_refused(both, changes, said, tmp_path):
    path = write(tmp_path / "h.jsonl", [HELLASWAG | changes])
    with pytest.raises(UsageError, match=said):
        hellaswag(both[0], ByteTokenizer(), path)


@pytest.mark.parametrize(
    ("task", "item", "said"),
    [
        (lambada, {"text": 3}, "line 1 has 3 as its 'text'"),
        (lambada, {"text": " word "}, "item 1 has fewer than two words"),
        (multiple_choice, {"context": "", "choices": [], "answer": 0}, "and 0 choices"),
        (multiple_choice, {"context": "", "choices": ["a"], "answer": 0.5}, "has 0.5 as its"),
    ],
    ids=["number", "one word", "no choices", "half"],
)
def test_an_item_that_cannot_be_scored_is_refused(both, task, item, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        task(both[0], ByteTokenizer(), write(tmp_path / "a.jsonl", [item]))


def test_lines_are_json_objects_whatever_separators_their_texts_have(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_jsonl(path, {"text": str}) == [{"text": "a\u2028b\x85c"}]


def test_of_one_item_the_error_is_unknown_and_the_json_is_valid(both, tmp_path, capsys):
    export_huggingface(both[0], ByteTokenizer(), tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--json"]
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    words += ["--lambada", str(write(tmp_path / "x" / "a.jsonl", [{"text": "to be"}]))]
    item = {"context": "q", "choices": ["a", "b"], "answer": 1}
    words += ["--choices", str(write(tmp_path / "y" / "a.jsonl", [item]))]
    assert main(words) == 0

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    [scores] = json.loads(capsys.readouterr().out, parse_constant=refuse)["scores"].values()
    assert len(scores) == 2
    assert all(m["standard_error"] is None for task in scores.values() for m in task.values())


def test_an_answer_that_is_no_choice_is_refused(both, tmp_path):
    item = {"context": "q", "choices": ["a", "b"], "answer": 2}
    with pytest.raises(UsageError, match="item 1 has the answer 2 and 2 choices"):
        multiple_choice(both[0], ByteTokenizer(), write(tmp_path / "c.jsonl", [item]))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_a_model_is_evaluated_in_the_format_that_is_asked_for(weights, both, tmp_path, capsys):
    export_huggingface(load_folder_copy(both[0], 1.0), ByteTokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("to be or not to be " * 50)
    packed = gpt.prepare_for_inference(gpt.load(tmp_path / "model").model, weights)
    save_packed(packed, ByteTokenizer(), tmp_path / "packed")
    losses = []
    for name in ("model", "packed"):
        words = ["evaluate", str(tmp_path / name), "--text", str(tmp_path / "text.txt"), "--json"]
        assert main([*words, "--weights", weights, "--device", "cpu"]) == 0
        [scores] = json.loads(capsys.readouterr().out)["scores"].values()
        losses.append(scores[str(tmp_path / "text.txt")]["nats/token"]["value"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if weights[0] in "fi" else 1e-2)
    assert main([*words, "--device", "cpu"]) == 0
    assert f"packed: weights in {weights}, on cpu" in capsys.readouterr().err
    other = "int4" if weights == "int8" else "int8"
    assert main([*words, "--weights", other, "--device", "cpu"]) == 2
    assert (
        f"weights is '{other}', and {tmp_path / 'packed'} is packed in {weights}"
        in capsys.readouterr().err
    )


def test_the_command_shows_a_table_or_json_and_compares_two_models(both, tmp_path, capsys):
    names = []
    for name, scale in (("one", 1.0), ("two", 0.05)):
        model = load_folder_copy(both[0], scale)
        export_huggingface(model, ByteTokenizer(), tmp_path / name)
        names.append(str(tmp_path / name))
    (tmp_path / "text.txt").write_text("to be or not to be " * 50)
    words = ["evaluate", *names, "--text", str(tmp_path / "text.txt"), "--paired"]
    words += ["--weights", "float32", "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "nats/token" in shown
    assert "is better" in " ".join(shown.split())  # the table's width wraps it
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    scores = [
        content["scores"][n][str(tmp_path / "text.txt")]["nats/token"]["value"] for n in names
    ]
    difference = content["difference"]
    assert difference["nats_per_token"] == pytest.approx(scores[0] - scores[1])
    assert difference["low"] < difference["nats_per_token"] < difference["high"]


def exported_with(folder, *, context=48, vocab_size=257, tokenizer=None):
    config = ModelConfig(
        vocab_size=vocab_size, context_length=context, n_layer=1, n_head=2, n_embd=16
    )
    export_huggingface(make_model(config), tokenizer or ByteTokenizer(), folder)
    return str(folder)


def test_models_of_different_contexts_are_compared_on_windows_of_the_shorter(tmp_path, capsys):
    names = [exported_with(tmp_path / str(n), context=n) for n in (48, 32)]
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 50)
    words = ["evaluate", *names, "--text", str(text), "--json", "--weights", "float32"]
    assert main([*words, "--paired", "--device", "cpu"]) == 0
    done = capsys.readouterr()
    assert "scored on windows of 32 tokens, because the contexts are 48 and 32" in done.err
    content = json.loads(done.out)
    losses = [content["scores"][n][str(text)]["nats/token"]["value"] for n in names]
    for name, loss in zip(names, losses, strict=True):
        model, tokenizer = gpt.load(name)
        ids = encode_text(tokenizer, open_corpus(str(text)))
        assert score_text(model, tokenizer, ids, context=32).loss == pytest.approx(loss, rel=1e-5)
    assert content["difference"]["nats_per_token"] == pytest.approx(losses[0] - losses[1])
    assert main([*words, "--paired", "--stride", "40", "--device", "cpu"]) == 2
    assert (
        "stride is 40, and must be from 1 to the length of a window (32)" in capsys.readouterr().err
    )


def test_a_text_from_a_pipe_is_scored_by_every_model_as_a_file_is(tmp_path, capsys):
    names = [exported_with(tmp_path / str(n), context=n) for n in (48, 32)]
    raw = b"to be or not to be " * 50
    (tmp_path / "text.txt").write_bytes(raw)
    with piped(raw) as source:
        for text in (source, str(tmp_path / "text.txt")):
            words = ["evaluate", *names, "--text", text, "--json", "--device", "cpu"]
            assert main(words) == 0
    one, two = capsys.readouterr().out.split("}\n{")
    assert source in one
    assert one.replace(source, str(tmp_path / "text.txt")) + "}\n" == "{" + two


def test_the_text_is_looked_up_once_and_the_sentence_about_it_names_the_option(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = [exported_with(tmp_path / str(n)) for n in (1, 2)]
    Path("shakespeare").write_text("to be or not to be " * 50)
    words = ["evaluate", *names, "--device", "cpu", "--text"]
    assert main([*words, "shakespeare", "--paired"]) == 0
    said = "text shakespeare is the file in this folder, not the named corpus"
    assert capsys.readouterr().err.count(said) == 1
    assert main([*words, "nothing"]) == 2
    assert "text is 'nothing', which is not a file" in capsys.readouterr().err


def test_models_that_make_different_tokens_are_not_compared_and_not_scored(
    tmp_path, capsys, monkeypatch
):
    names = [exported_with(tmp_path / "bytes")]
    characters = CharTokenizer("to be rn")
    names.append(exported_with(tmp_path / "characters", vocab_size=9, tokenizer=characters))
    (tmp_path / "text.txt").write_text("to be or not to be " * 50)
    monkeypatch.delattr("gpt.evaluation.report.score_text")
    words = ["evaluate", *names, "--text", str(tmp_path / "text.txt"), "--paired"]
    assert main([*words, "--device", "cpu"]) == 2
    assert "make different tokens of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["my [draft]", "a [/b] c", "[red]", "\x1b[31mred"])
def test_names_are_shown_as_they_are_whatever_brackets_they_have(name, tmp_path, capsys):
    names = [exported_with(tmp_path / "models" / part) for part in (name, "other")]
    text = tmp_path / "a [text] of [/b].txt"
    text.parent.mkdir()
    text.write_text("to be or not to be " * 50)
    console = Console(width=500, force_terminal=False)
    words = EvaluateConfig(models=tuple(names), text=str(text), paired=True, device="cpu")
    console.print(as_table(measure(words, say=lambda text: None)))
    shown = capsys.readouterr().out
    assert f"{foreign(names[0])} " in shown
    assert f"{text}: nats/token" in shown
    assert "\x1b[31m" not in shown


ROTARY = ModelConfig(
    vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=16, position="rotary"
)


def evaluated(model, folder, capsys, *words):
    """The status and what was printed."""
    save_packed(gpt.prepare_for_inference(model, "float32"), ByteTokenizer(), folder / "m")
    (folder / "text.txt").write_text("to be or not to be " * 9)
    words = [str(folder / "m"), "--text", str(folder / "text.txt"), "--json", *words]
    return main(["evaluate", *words, "--device", "cpu"]), capsys.readouterr()


@pytest.mark.parametrize("factor", [None, 3.0])
@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"])
def test_a_model_is_evaluated_beyond_its_training_with_any_scaling(
    scaling, factor, tmp_path, capsys
):
    if scaling == "none" and factor:
        return
    model = make_model(ROTARY)
    words = ["--context_length", "32", "--rotary_scaling", scaling]
    words += [f"--rotary_scaling_factor={factor}"] if factor else []
    status, done = evaluated(model, tmp_path, capsys, *words)
    assert status == 0
    [scores] = json.loads(done.out)["scores"].values()
    [loss] = [metrics["nats/token"]["value"] for metrics in scores.values()]
    changes = {"rotary_scaling": scaling, "rotary_scaling_factor": factor or 2.0}
    changes = {} if scaling == "none" else changes | {"rotary_trained_length": 16}
    config = dataclasses.replace(ROTARY, context_length=32, **changes)
    longer = make_model(config)  # of the same weights
    ids = encode_text(ByteTokenizer(), open_corpus(str(tmp_path / "text.txt")))
    expected = score_text(longer, ByteTokenizer(), ids, stride=32).loss
    assert loss == pytest.approx(expected, rel=1e-5)
    if scaling != "none":
        plain = score_text(model, ByteTokenizer(), ids, context=32, stride=32).loss
        assert abs(loss - plain) > 3e-5


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"position": "alibi"}, ["32", "yarn"], "the positions of M are alibi, which it cannot"),
        ({"position": "learned"}, ["32", "none"], "the positions of M are learned"),
        ({}, ["16", "yarn"], "needs more than the 16 tokens that M was trained on"),
        ({"window": 4, "sinks": 2}, ["32", "dynamic_ntk"], "needs model.position 'rotary' and no"),
    ],
)
def test_a_scaling_that_cannot_extend_a_model_is_refused(changes, words, said, tmp_path, capsys):
    model = make_model(dataclasses.replace(ROTARY, **changes))
    words = ["--context_length", words[0], "--rotary_scaling", words[1]]
    status, done = evaluated(model, tmp_path, capsys, *words)
    assert status == 2
    assert said in done.err.replace(str(tmp_path / "m"), "M")
    assert done.err.count("\n") == 1


def load_folder_copy(model, scale):
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embed.weight.mul_(scale)
    return other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m"], "nothing to evaluate on"),
        (["--text", "t"], "models is empty: name one or more"),
        (["m", "--text", "t", "--paired"], "paired compares two models on one text"),
        (["m", "--text", "t", "--stride", "-1"], "stride is -1"),
        (["m", "--text", "t", "--rotary_scaling", "ntk"], "give context_length as well"),
        (
            ["m", "--text", "t", "--context_length", "9", "--rotary_scaling_factor", "2"],
            "rotary_scaling_factor is 2, and needs a rotary_scaling",
        ),
        (["m", "m", "--text", "t", "--paired"], "models are m, m, and must all be different"),
    ],
)
def test_words_that_make_no_sense_are_refused(words, said, capsys):
    assert main(["evaluate", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_model_is_exported_by_the_command(tmp_path, capsys):
    from tests.test_cli import RUN

    words = ["export", str(RUN), str(tmp_path / "out")]
    assert main(words) == 2  # its keys are grouped, which GPT-2 cannot express
    assert "cannot express model.n_kv_head 1" in capsys.readouterr().err
