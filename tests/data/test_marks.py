import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import byte_pair
from gpt.data.marks import is_space, marked
from gpt.data.patterns import MARKED_PATTERNS
from gpt.data.tokenizer import GPT2Tokenizer, encode_documents

RANKS = GPT2Tokenizer.released().ranks
PARTS = ["a", "x1", "1234", " ", "  ", "\n", "\r\n", "\t", "\x85", "\xa0", "\u2003", "\u3000",
         "\x1f", "\u200b", "é", "中", "😀", "'s", "'LL", "'\u017f", "!", "?!\n", "<|endoftext|>",
         "\0"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), min_size=1).map("".join)
ANY = st.one_of(TEXTS, st.text())


@pytest.fixture(scope="module", params=sorted(MARKED_PATTERNS))
def tokenizer(request):
    return GPT2Tokenizer(RANKS, pattern=request.param)


def ids_of(tokenizer, text, monkeypatch, *, long):
    monkeypatch.setattr(byte_pair, "_LONG", long)
    return tokenizer.encode(text).tolist()


def test_a_marked_text_has_the_ids_of_the_whole_expression(tokenizer):
    @given(ANY)
    def claim(text):
        with pytest.MonkeyPatch.context() as monkeypatch:
            usual = ids_of(tokenizer, text, monkeypatch, long=sys.maxsize)
            assert ids_of(tokenizer, text, monkeypatch, long=0) == usual

    claim()


def test_documents_that_are_encoded_together_have_the_ids_of_each(tokenizer):
    @given(st.lists(ANY))
    def claim(texts):
        with pytest.MonkeyPatch.context() as monkeypatch:
            alone = [ids_of(tokenizer, t, monkeypatch, long=sys.maxsize) for t in texts]
            for long in (0, sys.maxsize):
                monkeypatch.setattr(byte_pair, "_LONG", long)
                together = [ids.tolist() for ids in encode_documents(tokenizer, texts)]
                assert together == [[*ids, tokenizer.end_of_text] for ids in alone]

    claim()


def test_long_texts_of_the_marked_patterns_are_read_without_look_ahead():
    for pattern, expression in MARKED_PATTERNS.items():
        tokenizer = GPT2Tokenizer(RANKS, pattern=pattern)
        tokenizer.encode("a  b" * byte_pair._LONG)
        assert list(tokenizer._encodings) == [expression]
        assert "(?!" not in expression
        assert "++" not in expression


def test_white_space_is_unicodes():
    import regex

    spaces = [ord(s) for s in regex.findall(r"\s", "".join(map(chr, range(sys.maxunicode + 1))))]
    codes = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    assert np.flatnonzero(is_space(codes)).tolist() == spaces
    assert np.flatnonzero(is_space(codes[:128].astype(np.uint8))).tolist() == spaces[:6]


def test_marks_stand_where_white_space_is_cut():
    assert marked("gpt2", "a  b \n c\n\nd ") == "a \0 b \n\0 c\n\0\nd "
    assert marked("llama3", "a  b\n\nc") == "a \0 b\n\nc"
    assert marked("gpt2", "a  <b>  <b>", uncut=[3, 8]) == "a  <b>  <b>"


def test_a_vocabulary_without_the_marks_byte_reads_long_texts():
    ranks = [bytes([byte]) for byte in range(1, 256)]
    tokenizer = GPT2Tokenizer(ranks)
    assert tokenizer.encode("a  b" * byte_pair._LONG).tolist()[:4] == [96, 31, 31, 97]
