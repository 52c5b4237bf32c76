import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt.config import UsageError
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

    monkeypatch.setattr(tokenizers, "_GPT2_WHEEL", "a_wheel_that_is_not_installed")

    def offline(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match="could not be downloaded .* make setup"):
        GPT2Tokenizer.released()


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other"}', '{"kind": "char"}', None])
def test_a_broken_tokenizer_file_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="tokenizer.json (is broken|cannot be read)"):
        tokenizers.load(path)
