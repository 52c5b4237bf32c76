"""Words and characters as tokens, and what is not in the vocabulary."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data import words
from gpt.data.tokenizer import CharTokenizer, byte_lengths, decode, encode_special
from gpt.data.words import WordTokenizer, train_characters, train_words
from tests.data.test_tokenizer import HARD_TEXT

CODONS = "ATG GCC TAA\nATG  GCC\tTGA ATG\n"
SHOWN = "\ufffd"


@settings(derandomize=True, deadline=None)
@given(text=st.text(max_size=60))
def test_the_words_of_a_text_are_the_text(text):
    made = train_words([text], unknown=False)
    ids = made.encode(text).tolist()
    assert decode(made, ids) == text
    assert byte_lengths(made)[ids].sum() == len(text.encode())
    assert made.end_of_text not in ids


def test_a_word_has_the_space_before_it_and_other_white_space_is_a_token_each():
    made = train_words([CODONS], unknown=False)
    pieces = [made.decode_bytes([i]).decode() for i in made.encode("ATG  GCC\tTGA\n")]
    assert pieces == ["ATG", " ", " GCC", "\t", "TGA", "\n"]


def test_the_most_frequent_words_have_the_first_ids():
    made = train_words(["b a a a c c"], unknown=False)
    assert made.words == [" a", " c", "b"]


def test_a_word_without_its_space_is_known_too():
    made = train_words(["to be be or to"], vocab_size=6, unknown=True)
    assert made.words == [" ", " be", " or", " to"]
    made = train_words(["be\nto"], unknown=True)
    assert decode(made, made.encode("to be").tolist()) == "to be"
    assert len(made.encode("to be")) == 3


def test_unknown_words_become_one_token_and_their_white_space_stays():
    made = train_words([CODONS], vocab_size=8, unknown=True)
    assert made.vocab_size == 8
    assert decode(made, made.encode("ATG XYZ\nXYZ").tolist()) == f"ATG {SHOWN}\n{SHOWN}"
    assert made.special["<UNK>"] == made.vocab_size - 1


def test_without_unknown_a_word_that_is_not_in_the_vocabulary_is_named():
    made = train_words([CODONS], unknown=False)
    with pytest.raises(
        UsageError, match=r"the word 'XYZ' is not in .* vocabulary of 8 words; train"
    ):
        made.encode("ATG XYZ")


def test_a_vocabulary_without_room_for_all_words_needs_unknown():
    with pytest.raises(UsageError, match="has 8 distinct words, and vocab_size is 8 .* at least 9"):
        train_words([CODONS], vocab_size=8, unknown=False)
    assert train_words([CODONS], vocab_size=9, unknown=False).vocab_size == 9


def test_a_text_with_too_many_words_is_refused(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    with pytest.raises(UsageError, match="more than 3 distinct words, too many for the words"):
        train_words(["a b c d"], unknown=True)


def test_unknown_characters_become_one_token():
    made = CharTokenizer("abc ", unknown=True)
    assert decode(made, made.encode("a\U0001f600b\u6771").tolist()) == f"a{SHOWN}b{SHOWN}"
    assert (made.end_of_text, made.vocab_size) == (4, 6)
    assert made.encode("").tolist() == []


def test_the_most_frequent_characters_are_kept():
    assert train_characters(["abc", "bcc"], vocab_size=4) == "cb"
    assert sorted(train_characters(["abc", "b\U0001f600"])) == sorted("abc\U0001f600")


@pytest.mark.parametrize(
    "made",
    [CharTokenizer("a <UNK>"), WordTokenizer(["a", " <UNK>"]), CharTokenizer("a", unknown=True)],
)
def test_special_tokens_are_read_only_where_they_are_asked_for(made):
    unknown = made.special.get("<UNK>")
    assert unknown is None or encode_special(made, "a<UNK>").tolist() == [0, unknown]
    ends = encode_special(made, "a<|endoftext|>a").tolist()
    assert ends == [*made.encode("a"), made.end_of_text, *made.encode("a")]
    assert made.end_of_text not in made.encode("a <UNK>" if unknown is None else "<|endoftext|>")


@pytest.mark.parametrize(
    "made",
    [
        train_words(HARD_TEXT, unknown=False),
        train_words(HARD_TEXT, vocab_size=9, unknown=True),
        CharTokenizer("abc", unknown=True),
    ],
)
def test_a_saved_tokenizer_is_loaded_equal(made, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.to_json(made), encoding="utf-8")
    loaded = tokenizers.load(path)
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(made)
    for text in HARD_TEXT:
        if made.unknown is not None or made.kind == "words":
            assert np.array_equal(loaded.encode(text), made.encode(text))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"kind": "words"}, "words must be a list of words"),
        ({"kind": "words", "words": ["a b"]}, "words must be a list of words"),
        ({"kind": "words", "words": [""]}, "words must be a list of words"),
        ({"kind": "words", "words": ["a", "a"]}, "words has the same word twice"),
        (
            {"kind": "words", "words": ["a"], "unknown": 1},
            "unknown is 1, and must be true or false",
        ),
        (
            {"kind": "char", "characters": "a", "unknown": "x"},
            "unknown is 'x', and must be true or",
        ),
        ({"kind": "sentencepiece"}, "model is None, and must be base64"),
        ({"kind": "sentencepiece", "model": "!"}, "model is not base64"),
        ({"kind": "sentencepiece", "model": "AAAA"}, "sentencepiece cannot read it"),
    ],
)
def test_a_broken_file_is_told_why(state, said, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match=rf"tokenizer.json is broken: .*{said}"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_the_word_that_is_not_in_the_vocabulary_is_named_and_not_the_space_before_it():
    made = WordTokenizer(["the", "cat", " sat"])
    with pytest.raises(UsageError, match="the word 'zebra' is not"):
        made.encode("the zebra")
    with pytest.raises(UsageError, match="the word ' cat' is not"):
        made.encode("the cat")
