"""SentencePiece models: the ids are those of the package sentencepiece."""

import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from gpt.data.tokenizer import byte_lengths, decode, encoder
from tests.data.test_tokenizer import HARD_TEXT
from tests.data.test_tokenizer_training import CHINESE

sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
LINES = [line for text in [*HARD_TEXT, CHINESE] for line in text.splitlines() if line.strip()] * 4
SHAPES = {
    "unigram": {"vocab_size": 600},
    "unigram bytes": {"vocab_size": 700, "byte_fallback": True},
    "bpe": {"vocab_size": 500, "model_type": "bpe", "eos_id": -1},
    "bpe bytes": {
        "vocab_size": 800,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "no space": {"vocab_size": 600, "add_dummy_prefix": False},
    "char": {"vocab_size": 400, "model_type": "char"},
}


@pytest.fixture(scope="module", params=SHAPES)
def both(request):
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=made,
        hard_vocab_limit=False,
        user_defined_symbols=["<sep>"],
        control_symbols=["<ctrl>"],
        minloglevel=2,
        num_threads=1,
        **SHAPES[request.param],
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    return request.param, SentencePieceTokenizer(made.getvalue()), library


@settings(derandomize=True, deadline=None, max_examples=60)
@given(text=st.sampled_from(HARD_TEXT) | st.text(max_size=40))
def test_the_ids_are_the_packages_and_special_tokens_are_text(both, text):
    _, ours, library = both
    text = f"{text}<sep></s><ctrl>"
    ids = ours.encode(text).tolist()
    assert ids == library.encode(text)
    assert not set(ids) & set(ours.special.values())
    assert max(ids) < ours.vocab_size


def test_with_bytes_and_without_normalisation_every_text_comes_back(both):
    name, ours, _ = both
    if name != "bpe bytes":
        return
    for text in [*HARD_TEXT, CHINESE]:
        assert decode(ours, ours.encode(text).tolist()) == text


def test_no_space_is_put_before_a_later_piece(both):
    _, ours, _ = both
    for first, later in [("the word", "so to what"), ("the word", " so to what")]:
        ids = [*encoder(ours, begins=True)(first), *encoder(ours, begins=False)(later)]
        assert decode(ours, ids) == first + later


def test_a_model_without_an_end_gets_one_more_token(both):
    name, ours, library = both
    n = library.get_piece_size()
    assert (ours.end_of_text, ours.vocab_size) == ((n, n + 1) if name == "bpe" else (2, n))
    assert ours.decode_bytes([ours.end_of_text]) == b""
    assert len(byte_lengths(ours)) == ours.vocab_size


def test_it_is_saved_and_loaded_equal(both, tmp_path):
    _, ours, _ = both
    (tmp_path / "tokenizer.json").write_text(tokenizers.to_json(ours))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(ours)
    assert loaded.encode(CHINESE).tolist() == ours.encode(CHINESE).tolist()


def test_without_the_package_it_says_what_to_install(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UsageError, match=r"needs the package sentencepiece.*pip install sentence"):
        SentencePieceTokenizer(both[1].model)
