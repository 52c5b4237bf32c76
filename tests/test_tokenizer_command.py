"""``gpt tokenizer`` on the command line, and train.py with tokenizers of one's own."""

import json

import pytest

from gpt.cli import main
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import decode


@pytest.fixture
def place(tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return main(["tokenizer", *map(str, words)])


def test_a_trained_tokenizer_is_compared_shown_and_exported(place, capsys):
    special = ["--special_tokens", "<START>", "<END>"]
    assert run("train", "text.txt", "--vocab_size", 320, "--out", "tok.json", *special) == 0
    assert capsys.readouterr().out == "tok.json: 320 tokens from 8,949 characters\n"
    assert run("show", "hear me <START>", "--tokenizer", "tok.json", "--special") == 0
    pieces, ids, count = capsys.readouterr().out.splitlines()
    assert pieces.replace("|", "") == "hear me <START>"
    assert pieces.endswith("|<START>")
    assert ids.endswith("|318")
    made = tokenizers.load(place / "tok.json")
    assert decode(made, [int(i) for i in ids.split("|")]) == "hear me "
    assert count == f"{len(ids.split('|'))} tokens"
    assert run("compare", "tok.json", "gpt2", "byte", "--on", "text.txt", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["tok.json", "gpt2", "byte"]
    assert report["byte"]["tokens"] == report["byte"]["bytes_per_token"] * 8_949 == 8_949
    assert report["tok.json"]["tokens"] == len(made.encode((place / "text.txt").read_text()))
    assert report["gpt2"]["unused"] > 50_000
    assert run("compare", "tok.json", "--on", "text.txt") == 0
    assert "bytes a token" in capsys.readouterr().out
    assert run("export", "tok.json", "out/tokenizer.json") == 0
    assert run("export", "tok.json", "folder") == 0
    exported = (place / "out" / "tokenizer.json").read_text()
    assert exported == (place / "folder" / "tokenizer.json").read_text()
    assert len(json.loads(exported)["added_tokens"]) == 3


@pytest.mark.parametrize("kind", ["words", "char"])
def test_words_and_characters_are_trained_with_unknown(kind, place, capsys):
    options = ["--tokenizer", kind, "--unknown", "--vocab_size", 20]
    assert run("train", "text.txt", *options) == 0
    assert tokenizers.load(place / "tok.json").vocab_size == 20
    capsys.readouterr()
    assert run("show", "me \u6771", "--tokenizer", "tok.json") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("<UNK>")


def test_pieces_are_coloured_on_a_terminal_and_split_by_bars_elsewhere():
    from gpt.data.tokenizer import GPT2Tokenizer
    from gpt.evaluation.tokens import pieces_as_text, shown

    made = GPT2Tokenizer.released()
    ids = made.encode("two \u6771\n").tolist()
    pieces = shown(made, ids)
    assert pieces[0] == "two"
    assert pieces[-1] == "\\n"
    assert all(piece.isprintable() for piece in pieces)
    coloured, numbers, _ = pieces_as_text(pieces, ids, colours=True)
    assert coloured.plain == "".join(pieces)
    assert len(coloured.spans) == len(numbers.spans) == len(ids)
    plain, numbers, _ = pieces_as_text(pieces, ids, colours=False)
    assert plain.plain == "|".join(pieces)
    assert numbers.plain == "|".join(map(str, ids))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian'; choose from train, compare, show, export"),
        (["train", "nosuch.txt"], "source is 'nosuch.txt', which is not a file"),
        (["train", "empty.txt"], "source is empty.txt, which has no text"),
        (["train", "text.txt", "--vocab_size", 99], "vocab_size is 99, and must be at least 257"),
        (["train", "text.txt", "--out", "text.txt"], "text.txt exists already; name a new file"),
        (["train", "text.txt", "--special_tokens", "a", "a"], "special_tokens has 'a' twice"),
        (
            ["train", "text.txt", "--special_tokens", ""],
            "special_tokens has '', and must have text",
        ),
        (
            ["train", "text.txt", "--tokenizer", "words", "--special_tokens", "<a>"],
            "special_tokens are for bpe, and tokenizer is words",
        ),
        (["train", "text.txt", "--unknown"], "unknown is for the tokenizers char and words"),
        (["compare"], "tokenizers is empty: name one or more"),
        (["compare", "gpt2", "gpt2"], "tokenizers are gpt2, gpt2, and must all be different"),
        (["compare", "nosuch"], "tokenizers is 'nosuch', which is neither a file nor one of"),
        (["compare", "gpt2", "--on", "nosuch"], "on is 'nosuch', which is not a file"),
        (["show", "x", "--tokenizer", "bpe"], "tokenizer is 'bpe', which is made from a text"),
        (["export", "gpt2", "text.txt"], "text.txt exists already; name a new folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(words, said, place, capsys):
    (place / "empty.txt").touch()
    before = sorted(place.iterdir())
    assert run(*words) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(place.iterdir()) == before


def test_the_commands_are_listed(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert "usage: gpt tokenizer COMMAND" in said
    assert all(name in said for name in ("train", "compare", "show", "export"))


TINY = [
    "--data.source", "text.txt", "--model.n_layer", "1", "--model.n_head", "1",
    "--model.n_embd", "16",
    "--model.context_length", "16", "--training.batch_tokens", "256", "--evaluation.windows", "2",
    "--evaluation.sample_tokens", "3", "--run_dir", "run",
]  # fmt: skip


def test_train_learns_byte_pairs_and_goes_on(place, capsys):
    words = [*TINY, "--data.tokenizer", "bpe", "--data.vocab_size", "300"]
    assert main(["train", *words, "--training.max_steps", "2"]) == 0
    assert "byte-pair tokenizer" in capsys.readouterr().out
    assert tokenizers.load(place / "run" / "tokenizer.json").vocab_size == 300
    assert main(["train", "run/config.toml", "--resume", "--training.max_steps", "3"]) == 0
    assert main(["sample", "--model", "run", "--prompt", "me", "--max_new_tokens", "3"]) == 0


def test_train_takes_a_tokenizer_from_a_file_and_resumes_without_it(place, capsys):
    assert run("train", "text.txt", "--tokenizer", "words") == 0
    words = [*TINY, "--data.tokenizer", "tok.json"]
    assert main(["train", *words, "--training.max_steps", "2"]) == 0
    own = (place / "run" / "tokenizer.json").read_text()
    assert own == (place / "tok.json").read_text()
    (place / "tok.json").unlink()
    assert main(["train", "run/config.toml", "--resume", "--training.max_steps", "3"]) == 0
    assert main(["prepare", "--data.source", "text.txt", "--data.tokenizer", "gpt5"]) == 2
    assert "data.tokenizer is 'gpt5', which is neither" in capsys.readouterr().err
    assert main(["train", *words, "--run_dir", "other"]) == 2
    assert "data.tokenizer is 'tok.json', which is neither" in capsys.readouterr().err
    assert not (place / "other").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--data.tokenizer", "bpe", "--data.vocab_size", "300"],
        ["--data.tokenizer", "words"],
        ["--data.tokenizer", "char", "--data.unknown"],
        ["--data.tokenizer", "tok.json"],
    ],
)
def test_prepare_takes_every_tokenizer(options, place, capsys):
    assert run("train", "text.txt", "--vocab_size", 280) == 0
    assert main(["prepare", "text.txt", "--out", "shards", *options]) == 0
    made = tokenizers.load(place / "shards" / "tokenizer.json")
    assert main(["prepare", "text.txt", "--out", "shards", *options]) == 0
    assert "is prepared already" in capsys.readouterr().err
    if "tok.json" in options:
        assert tokenizers.to_json(made) == (place / "tok.json").read_text()
    if "bpe" in options:
        assert made.vocab_size == 300
        other = ["--data.tokenizer", "bpe", "--data.vocab_size", "310"]
        assert main(["prepare", "text.txt", "--out", "shards", *other]) == 2
        assert "has other prepared data" in capsys.readouterr().err
