"""Tokenizers from their files: the ids are those of Hugging Face's fast tokenizer."""

import json
import random

import pytest
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer

from gpt.config import UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.byte_pair import PATTERNS
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.data.tokenizer import GPT2Tokenizer, decode
from gpt.interop.vocabulary import load_tokenizer
from gpt.interop.vocabulary_export import hugging_face_files
from tests.data.test_tokenizer import HARD_TEXT

NOISE = [
    "".join(random.Random(seed).choices("ab c\n\t'\u0301é東\U0001f600<|>xT", k=80))
    for seed in range(50)
]
ALL_BYTES = ["".join(map(chr, range(256)))]


def ids_of(theirs, text):
    theirs.encode_special_tokens = True  # what looks like a special token in a text is text
    return theirs.encode(text).ids


@pytest.fixture(scope="module")
def released():
    return GPT2Tokenizer.released()


@pytest.fixture
def folder(released, tmp_path):
    """GPT-2's tokenizer.json, as this project writes it and the tokenizers library reads it."""
    for name, content in hugging_face_files(released).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def test_tokenizer_json_gives_the_fast_tokenizers_ids(folder):
    ours, theirs = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*HARD_TEXT, *NOISE, *ALL_BYTES]:
        assert ours.encode(text).tolist() == ids_of(theirs, text), repr(text)
        assert decode(ours, ours.encode(text).tolist()) == text


def test_added_tokens_are_taken_whole_and_special_ones_are_not(folder):
    path = str(folder / "tokenizer.json")
    theirs = Tokenizer.from_file(path)
    theirs.add_tokens([AddedToken("<chat>", normalized=False)])
    theirs.add_special_tokens([AddedToken("<|sep|>", special=True, normalized=False)])
    theirs.save(path)
    ours = load_tokenizer(folder)
    assert ours.vocab_size == 50259
    for text in ["a <chat>b<chat>", "<|sep|> is text", "x<|endoftext|><chat>"]:
        assert ours.encode(text).tolist() == ids_of(theirs, text), text
    assert ours.encode("<chat>").tolist() == [50257]
    assert ours.decode_bytes([50257, 50258, 50256]) == b"<chat>"
    again = tokenizers._from_state({"kind": "gpt2"} | json.loads(json.dumps(ours.state())))
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(ours)
    assert again.encode("a <chat>").tolist() == ours.encode("a <chat>").tolist()


def trained(tmp_path, special):
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(HARD_TEXT * 3 + NOISE, vocab_size=400, special_tokens=special)
    return theirs


def test_vocab_and_merges_of_a_tokenizer_trained_elsewhere(tmp_path):
    theirs = trained(tmp_path, ["<s>", "<|endoftext|>"])  # its special tokens come first
    theirs.save(str(tmp_path / "tokenizer.json"))
    whole = load_tokenizer(tmp_path)
    assert (whole.first_id, whole.end_of_text) == (2, 1)
    (tmp_path / "pair").mkdir()
    other = trained(tmp_path, ["<|endoftext|>"])
    other.save_model(str(tmp_path / "pair"))
    pair = load_tokenizer(tmp_path / "pair")
    for mine, its in ((whole, theirs), (pair, other)):
        for text in [*HARD_TEXT, *NOISE]:
            if "<|endoftext|>" not in text:
                assert mine.encode(text).tolist() == its.encode(text).ids, repr(text)


def test_a_folder_without_a_tokenizer_has_the_released_one(released, tmp_path):
    assert tokenizers.fingerprint(load_tokenizer(tmp_path)) == tokenizers.fingerprint(released)


def test_the_models_own_end_of_text_counts(folder):
    assert load_tokenizer(folder, end_of_text=[50256]).end_of_text == 50256
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.add_special_tokens(["<|end|>"])
    theirs.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, end_of_text=[50257]).end_of_text == 50257


def test_of_several_ends_of_a_text_the_first_special_one_counts_and_all_stay_special(folder):
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.add_special_tokens(["<|end|>"])
    theirs.add_tokens(["<chat>"])
    theirs.save(str(folder / "tokenizer.json"))
    for ids, end in (
        ([50257, 50256], 50257),
        ([50258, 50257], 50257),
        ([9, 8], 50256),
        ([], 50256),
    ):
        tokenizer = load_tokenizer(folder, end_of_text=ids)
        assert tokenizer.end_of_text == end
        assert tokenizer.special == {"<|endoftext|>": 50256, "<|end|>": 50257}


def changed(content, how):
    model, added = content["model"], content["added_tokens"]
    match how:
        case "unigram":
            model["type"] = "Unigram"
        case "prefix space":
            content["pre_tokenizer"]["add_prefix_space"] = True
        case "lstrip":
            more = {"id": len(model["vocab"]) + 1, "content": "<m>", "special": False}
            added.append(added[0] | more | {"lstrip": True})
        case "merge order":
            model["merges"][10], model["merges"][11] = model["merges"][11], model["merges"][10]
        case "gap":
            added[0]["id"] = 60000
        case "no end":
            added.clear()
        case "lacks a byte":
            model["vocab"]["spare"] = model["vocab"].pop("!")
        case "post processor":
            content["post_processor"] = {"type": "TemplateProcessing", "single": []}
        case "suffix":
            model["end_of_word_suffix"] = "</w>"
        case "empty":
            model["vocab"], model["merges"] = {}, []
        case "no model":
            del content["model"]
    return content


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("unigram", "has model.type 'Unigram', and must have BPE"),
        ("no end", "no end-of-text token"),
        ("post processor", "has the post_processor .*, which could add tokens"),
        ("empty", "has an empty vocabulary"),
        ("no model", "has model.merges None|lacks an id for a token in model.vocab"),
    ],
)
def test_a_tokenizer_whose_ids_could_differ_is_refused(how, said, folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), how)))
    with pytest.raises(UsageError, match=said):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "how", ["prefix space", "lstrip", "merge order", "gap", "lacks a byte", "suffix"]
)
def test_what_tiktoken_cannot_express_is_computed_by_the_library(how, small):
    path = small / "tokenizer.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), how)))
    ours, theirs = load_tokenizer(small), Tokenizer.from_file(str(path))
    assert isinstance(ours, LibraryTokenizer)
    for text in [*HARD_TEXT, *NOISE, *ALL_BYTES, "x <m> y"]:
        assert ours.encode(text).tolist() == ids_of(theirs, text), repr(text)
    again = tokenizers.load(saved_tokenizer(ours, small / "own.json"))
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(ours)
    assert again.encode("a b").tolist() == ours.encode("a b").tolist()


@pytest.fixture
def small(tmp_path):
    """A trained tokenizer.json of few tokens."""
    trained(tmp_path, ["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_added_tokens_are_hugging_faces_the_longest_first(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    known = next(t for t in content["model"]["vocab"] if t.isascii() and len(t) > 3 and t.isalpha())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    last = max(token["id"] for token in content["added_tokens"])
    new = [("<a>", last + 1), ("<a><b>", last + 2), ("<a><b><c>", last + 3)]
    new.append((known, content["model"]["vocab"][known]))
    content["added_tokens"] += [{"id": i, "content": t, **flags} for t, i in new]
    path.write_text(json.dumps(content))
    theirs, ours = Tokenizer.from_file(str(path)), load_tokenizer(folder)
    for text in ("x<a><b><c>y", "<a><b>", "<a> <b><c><a>", f"a{known}b <a>{known}", "plain", ""):
        assert ours.encode(text).tolist() == theirs.encode(text).ids
        assert decode(ours, ours.encode(text).tolist()) == text
    again = tokenizers.load(saved_tokenizer(ours, folder / "own.json"))
    assert again.encode(f"x<a><b>{known}").tolist() == ours.encode(f"x<a><b>{known}").tolist()


def saved_tokenizer(tokenizer, path):
    path.write_text(tokenizers.to_json(tokenizer))
    return path


def test_a_folder_with_vocab_and_merges_takes_its_added_tokens(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    n = len(vocab)
    place = tmp_path / "old"
    place.mkdir()
    (place / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": n}))
    lines = [m if isinstance(m, str) else " ".join(m) for m in merges]
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    (place / "added_tokens.json").write_text(json.dumps({"<old>": n + 1}))
    more = {str(n + 2): {"content": "<chat>", "special": False}}
    more |= {str(n + 3): {"content": "<pad>", "special": True}}
    (place / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": more}))
    tokenizer = load_tokenizer(place)
    assert tokenizer.encode("<old><chat>").tolist() == [n + 1, n + 2]
    assert len(tokenizer.encode("<pad>")) > 1  # special tokens are text in a text
    assert tokenizer.vocab_size == n + 4
    (place / "merges.txt").unlink()
    with pytest.raises(UsageError, match=r"needs both vocab.json and merges.txt"):
        load_tokenizer(place)


def test_a_prefix_space_of_the_settings_alone_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    with pytest.raises(UsageError, match="add_prefix_space true, and tokenizer.json has false"):
        load_tokenizer(folder)


def test_a_tokenizer_with_another_pattern_than_gpt2s_is_not_exported_as_gpt2s(
    released, monkeypatch
):
    monkeypatch.setitem(PATTERNS, "letters", r"\p{L}|\P{L}")
    other = GPT2Tokenizer(released.ranks, pattern="letters")
    with pytest.raises(UsageError, match="the pattern letters cannot be exported"):
        hugging_face_files(other)
