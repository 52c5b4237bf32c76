"""tiktoken's encodings by name."""

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import UsageError
from gpt.data import encodings
from gpt.data import tokenizer as tokenizers
from gpt.data.encodings import encoding_names, load_encoding, of_encoding
from gpt.data.patterns import PATTERNS
from gpt.data.tokenizer import decode
from gpt.data.tokenizer_training import train_byte_pairs
from tests.data.test_tokenizer import HARD_TEXT
from tests.data.test_tokenizer_training import CHINESE, CODE

RANKS = train_byte_pairs(["\n".join([*HARD_TEXT, CHINESE, CODE])], vocab_size=700).ranks
LEARNED = {token: i for i, token in enumerate(RANKS)}
SHAPES = {
    "r50k_base": ("gpt2", LEARNED, {"<|endoftext|>": 699}),
    # a special token between the others
    "p50k_base": (
        "gpt2",
        {token: i + (i >= 600) for token, i in LEARNED.items()},
        {"<|endoftext|>": 600},
    ),
    # ids that are left out
    "cl100k_base": (
        "cl100k_base",
        LEARNED,
        {"<|endoftext|>": 700, "<|fim_prefix|>": 701, "<|endofprompt|>": 709},
    ),
    "o200k_base": ("o200k", LEARNED, {"<|endoftext|>": 699, "<|endofprompt|>": 718}),
}


def shaped(name):
    """An encoding with the pattern and the order of ids of a released one."""
    pattern, ranks, special = SHAPES[name]
    return tiktoken.Encoding(
        name, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.parametrize("name", SHAPES)
@settings(derandomize=True, deadline=None, max_examples=50)
@given(text=st.sampled_from([*HARD_TEXT, CHINESE, CODE]) | st.text(max_size=40))
def test_its_ids_are_tiktokens_and_special_tokens_are_text(name, text):
    theirs, ours = shaped(name), of_encoding(shaped(name))
    text = text + "x  \n  "
    assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
    assert decode(ours, ours.encode(text).tolist()) == text
    assert ours.end_of_text == theirs.eot_token
    assert ours.vocab_size == theirs.n_vocab
    assert decode(ours, range(ours.vocab_size)) == decode(ours, [*LEARNED.values()][:0]) + decode(
        ours, [i for i in range(ours.vocab_size) if i not in ours.special.values()]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_saved_and_loaded_equal(name, tmp_path):
    ours = of_encoding(shaped(name))
    (tmp_path / "tokenizer.json").write_text(tokenizers.to_json(ours))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(ours)
    assert loaded.encode(CODE).tolist() == ours.encode(CODE).tolist()


@pytest.mark.parametrize("name", [name for name in encoding_names() if name != "gpt2"])
def test_the_pattern_of_each_encoding_has_a_name(name, monkeypatch):
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *given, **more: {b"a": 0})
    assert openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"] in PATTERNS.values()


def test_an_encoding_that_is_not_at_hand_is_told_in_a_sentence(monkeypatch):
    def offline(name):
        raise ConnectionError

    monkeypatch.setattr(encodings.tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match=r"cl100k_base is not in its cache .*TIKTOKEN_CACHE_DIR"):
        load_encoding("cl100k_base")


def test_an_encoding_that_splits_in_another_way_is_refused():
    other = tiktoken.Encoding(
        "mine", pat_str=".", mergeable_ranks=LEARNED, special_tokens={"<|endoftext|>": 699}
    )
    with pytest.raises(UsageError, match=r"encoding mine splits a text with '.', which is not one"):
        of_encoding(other)


def test_an_encoding_without_an_end_of_text_is_refused():
    other = tiktoken.Encoding(
        "mine", pat_str=PATTERNS["gpt2"], mergeable_ranks=LEARNED, special_tokens={}
    )
    with pytest.raises(UsageError, match=r"encoding mine has no token <.endoftext.>"):
        of_encoding(other)
