"""Tokenizers that are trained on a text."""

import itertools
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt.config import DataConfig, Pattern, UsageError
from gpt.data import formats, tokenizer_training
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import open_corpus
from gpt.data.formats import PIECE_CHARACTERS, cut
from gpt.data.mixture import prepare_mixture
from gpt.data.patterns import PATTERNS, STEPS, steps_of
from gpt.data.prepare import prepare, read_prepared
from gpt.data.tokenizer import GPT2Tokenizer, decode, encode_special, encoder
from gpt.data.tokenizer_training import sampled, sliced, train_byte_pairs
from tests.data.test_tokenizer import HARD_TEXT

CHINESE = (Path(__file__).parent / "chinese.txt").read_text(encoding="utf-8")
CODE = Path(tokenizer_training.__file__).read_text(encoding="utf-8")
MARKED = (
    "\u00e9\u0301 e\u0301 \u0915\u094d\u0937 \U0001f469\u200d\U0001f469\u200d\U0001f467 "
    "\u3000\u3000\u4ed6 \r\n\r\n  \n\t\tx"
)
TEXT = "\n".join([*HARD_TEXT, CHINESE, CODE, *[MARKED] * 9])
SPECIAL = ("<START>", "<END>", "<UNK>", "<PAD>")
WORDS = sorted(set(TEXT.split(" ")))
PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(WORDS),
    st.sampled_from([*SPECIAL, "<|endoftext|>", "\r\n", "\n\n", "\t", "\u3000", "\u0301", "'Ll"]),
    st.integers(1, 9).map(lambda n: " " * n),
    st.integers(1, 9).map(lambda n: "\n" + "    " * n),
    st.integers(0, 10**9).map(str),
    st.tuples(st.integers(0, len(TEXT)), st.integers(0, 40)).map(lambda at: TEXT[at[0] :][: at[1]]),
)
HARD = st.lists(PARTS, max_size=12).map("".join)


@pytest.fixture(scope="module", params=PATTERNS)
def both(request):
    """Ours, and the library's own tokenizer, trained alike."""
    ours = train_byte_pairs([TEXT], vocab_size=900, pattern=request.param, special_tokens=SPECIAL)
    theirs = Tokenizer(models.BPE())
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    before = Tokenizer.from_str(json.dumps(empty | {"pre_tokenizer": steps_of(request.param)}))
    theirs.pre_tokenizer = before.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900 - 5,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([TEXT], trainer)
    return ours, theirs


def agree(both, text):
    ours, theirs = both
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text).ids
    assert decode(ours, ids) == text
    assert not set(ids) & set(ours.special.values())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(text=HARD)
def test_a_trained_tokenizers_ids_are_the_librarys_and_decode_to_the_text(both, text):
    agree(both, text)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=10_000)
@given(text=HARD)
def test_its_ids_are_the_librarys_on_ten_thousand_hard_texts(both, text):
    agree(both, text)


def test_its_ids_are_the_librarys_on_its_text_and_on_long_runs(both):
    for text in [TEXT, " " * 3000 + "x", "\n" * 3000, "A" * 3000, "中" * 3000, "\t" * 3000]:
        agree(both, text)


def test_special_tokens_follow_the_others_and_end_of_text_is_the_first_of_them():
    made = train_byte_pairs([TEXT], vocab_size=300, special_tokens=SPECIAL)
    assert made.vocab_size == 300
    assert made.special == {token: 295 + i for i, token in enumerate(["<|endoftext|>", *SPECIAL])}
    assert made.end_of_text == 295


def test_a_special_token_is_read_only_where_it_is_asked_for():
    made = train_byte_pairs([TEXT], vocab_size=300, special_tokens=SPECIAL)
    text = "a<START>b<|endoftext|>"
    assert decode(made, made.encode(text).tolist()) == text
    assert encode_special(made, text).tolist() == [*made.encode("a"), 296, *made.encode("b"), 295]
    assert encode_special(made, "").tolist() == []


def test_the_same_text_gives_the_same_tokenizer_however_it_is_cut(tmp_path):
    whole = train_byte_pairs([TEXT * 3], vocab_size=600)
    parts = train_byte_pairs(iter(sliced(TEXT * 3)), vocab_size=600)
    assert tokenizers.to_json(whole) == tokenizers.to_json(parts)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_ids_of_a_texts_pieces_are_the_ids_of_the_whole(pattern, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 50)
    made = train_byte_pairs([TEXT], vocab_size=900, pattern=pattern)
    text = CODE + "done.\n\nIf (x);\n" * 30
    parts = [encoder(made, begins=i == 0)(part) for i, part in enumerate(cut(text))]
    assert len(parts) > 20
    assert np.concatenate(parts).tolist() == made.encode(text).tolist()


def test_slices_are_the_text_and_end_before_a_space_that_follows_a_word(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "SLICE", 50)
    for text in [CODE, CHINESE, "a" * 300 + " b" * 300, "ab " + " " * 300 + "c d", ""]:
        slices = list(sliced(text))
        assert "".join(slices) == text
        for before, after in itertools.pairwise(slices):
            assert after[0] == " "
            assert not before[-1].isspace()
    assert max(map(len, sliced("ab cd " * 100))) <= 50


def test_a_text_with_few_pairs_gives_fewer_tokens_and_says_so():
    said = []
    made = train_byte_pairs(["ab ab"], vocab_size=1000, say=said.append)
    assert made.vocab_size == 258
    assert said == ["the text gives 258 tokens and not 1,000: no other pairs occur twice"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"vocab_size": 256},
            "vocab_size is 256, and must be at least 257: 256 bytes and 1 special",
        ),
        ({"vocab_size": 260, "special_tokens": SPECIAL}, "at least 261: 256 bytes and 5 special"),
        ({"special_tokens": ["<a>", " "]}, "special_tokens has ' ', and must have texts"),
        ({"special_tokens": ["<a>", "<b>", "<a>"]}, "special_tokens has '<a>' twice"),
        ({"special_tokens": ["the"]}, "'the', which is also an ordinary token of the text; mark"),
    ],
)
def test_a_vocabulary_that_cannot_be_made_is_refused_in_a_sentence(options, said):
    with pytest.raises(UsageError, match=said):
        train_byte_pairs(["the the the"], **options)


@pytest.mark.parametrize("pieces", [[], ["", ""]])
def test_an_empty_text_is_refused(pieces):
    with pytest.raises(UsageError, match="the text is empty"):
        train_byte_pairs(pieces)


def test_without_the_library_training_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UsageError, match=r"training a byte-pair tokenizer needs .* pip install tok"
    ):
        train_byte_pairs(["a"])


def test_a_long_text_is_sampled_by_whole_documents_always_alike(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text(f"document {i:03}")
    corpus, said = open_corpus(str(tmp_path)), []
    drawn = list(sampled(corpus.documents(), 2400, limit=1200, say=said.append))
    assert all(len(piece) == 12 for piece in drawn)
    assert 70 < len(drawn) < 130
    assert drawn == list(sampled(corpus.documents(), 2400, limit=1200))
    assert said == [
        "the text has 2,400 characters: the tokenizer learns from a sample of 50.0% of its "
        "documents"
    ]
    assert len(list(sampled(corpus.documents(), 2400, limit=2400, say=said.append))) == 200
    assert len(said) == 1


def test_a_long_document_is_sampled_by_its_pieces(tmp_path):
    (tmp_path / "long.txt").write_text("word " * (8 * PIECE_CHARACTERS // 5))
    corpus = open_corpus(str(tmp_path / "long.txt"))
    n = corpus.survey().length
    drawn = sum(map(len, sampled(corpus.documents(), n, limit=n // 2)))
    assert 0 < drawn < n


def test_a_vocabulary_of_chinese_needs_at_most_six_tenths_of_gpt2s_tokens():
    made = train_byte_pairs([CHINESE], vocab_size=8192, pattern="chinese")
    assert len(made.encode(CHINESE)) <= 0.6 * len(GPT2Tokenizer.released().encode(CHINESE))
    assert decode(made, made.encode(CHINESE).tolist()) == CHINESE


TRAINED = {
    "bpe": {"tokenizer": "bpe", "vocab_size": 300},
    "bpe cl100k": {"tokenizer": "bpe", "vocab_size": 300, "pattern": "cl100k"},
    "words": {"tokenizer": "words"},
    "words unknown": {"tokenizer": "words", "vocab_size": 20, "unknown": True},
    "char unknown": {"tokenizer": "char", "unknown": True},
    "char 10": {"tokenizer": "char", "vocab_size": 10, "unknown": True},
}


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_a_text_is_prepared_with_a_tokenizer_of_its_own(options, text_file, tmp_path):
    config = DataConfig(source=str(text_file), **options)
    first = prepare(config, tmp_path / "cache")
    ids = np.concatenate([first.train.ids, first.validation.ids]).tolist()
    text = text_file.read_text(encoding="utf-8")
    if "unknown" not in options:
        assert decode(first.tokenizer, ids) == text
    else:
        assert len(ids) > len(text.split())
    if options.get("vocab_size"):
        assert first.tokenizer.vocab_size <= options["vocab_size"]
    [folder] = (tmp_path / "cache").iterdir()
    again = prepare(config, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == [folder]
    assert tokenizers.to_json(again.tokenizer) == tokenizers.to_json(first.tokenizer)
    assert tokenizers.to_json(read_prepared(folder).tokenizer) == tokenizers.to_json(
        first.tokenizer
    )


def test_each_recipe_has_a_cache_of_its_own(text_file, tmp_path):
    for options in TRAINED.values():
        prepare(DataConfig(source=str(text_file), **options), tmp_path / "cache")
    assert len([*(tmp_path / "cache").iterdir()]) == len(TRAINED)


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("char", "text-char-22841c7523d3"),
        ("byte", "text-byte-1b4d4bee4699"),
        ("gpt2", "text-gpt2-522f9ea2dce9"),
    ],
)
def test_the_caches_of_older_runs_are_found(kind, folder, tmp_path):
    (tmp_path / "text.txt").write_text("the old text of an old run")
    prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer=kind), tmp_path / "cache")
    [made] = (tmp_path / "cache").iterdir()
    assert made.name == folder


def test_a_tokenizer_that_the_caller_had_to_load_is_asked_for(text_file, tmp_path):
    config = DataConfig(source=str(text_file), tokenizer="tok.json")
    with pytest.raises(UsageError, match="data.tokenizer is 'tok.json', and the caller gave no"):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizer": ""}, "data.tokenizer is empty"),
        (
            {"tokenizer": "gpt2", "unknown": True},
            "data.unknown is for the tokenizers char and words",
        ),
        ({"tokenizer": "gpt2", "vocab_size": 9}, "data.vocab_size is 9, and is for the tokenizers"),
        ({"vocab_size": 9}, "char has all characters of the text without data.unknown"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "must be at least 257 for bpe"),
        (
            {"tokenizer": "bpe", "pattern": "gpt5"},
            "data.pattern is 'gpt5', and must be one of gpt2",
        ),
        ({"tokenizer": "bpe", "vocab_size": -1}, "data.vocab_size is -1, and must be at least 0"),
    ],
)
def test_settings_that_no_tokenizer_has_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        DataConfig(**options)


def test_the_patterns_of_the_configuration_are_those_of_the_program():
    assert set(get_args(Pattern)) == set(PATTERNS) == set(STEPS)


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_a_mixture_has_one_tokenizer_of_all_its_sources(kind, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"some {name} words of {name} " * 50)
    sources = [json.dumps({"source": str(tmp_path / f"{name}.txt")}) for name in ("one", "two")]
    config = DataConfig(mixture=tuple(sources), tokenizer=kind)
    made = prepare_mixture(config, tmp_path / "cache").tokenizer
    assert made.kind == {"bpe": "gpt2"}.get(kind, kind)
    for name in ("one", "two"):
        assert len(made.encode(f" {name}")) == 1


def test_the_boundary_of_validation_cuts_no_word(tmp_path):
    (tmp_path / "codons.txt").write_text("ATG GCC\nTAA " * 20)
    for percent in range(5, 20):
        config = DataConfig(
            source=str(tmp_path / "codons.txt"),
            tokenizer="words",
            validation_fraction=percent / 100,
        )
        made = prepare(config, tmp_path / "cache")
        ids = [*made.train.ids.tolist(), *made.validation.ids.tolist()]
        assert decode(made.tokenizer, ids) == "ATG GCC\nTAA " * 20
