"""Byte-level vocabularies with each known pattern: the ids are those of the tokenizers library."""

import json

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt.config import UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.byte_characters import byte_characters
from gpt.data.byte_pair import PATTERNS, GPT2Tokenizer
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.data.patterns import steps_of
from gpt.data.tokenizer import decode
from gpt.interop.gguf_tokenizer import tokenizer_of
from gpt.interop.gguf_tokenizer_export import tokenizer_metadata
from gpt.interop.patterns import KNOWN
from gpt.interop.vocabulary import load_tokenizer
from gpt.interop.vocabulary_export import hugging_face_files
from tests.data.test_tokenizer import HARD_TEXT
from tests.interop.test_vocabulary import ALL_BYTES, NOISE, ids_of

TEXTS = [*HARD_TEXT, *NOISE, *ALL_BYTES]
HARD = st.text(
    st.sampled_from(
        "aAb\u00e9\u00df\u017f\u212a'sStT019\u0663\u2163 ,.!?(|)、。،…/\n\r\t"
        "\u00a0\u3000\u0301東\U0001f600<>_"
    )
    | st.characters(exclude_categories=["Cs", "Cn"]),
    max_size=40,
)


def train(before, **model):
    """A small vocabulary that the library trains with the steps ``before``."""
    theirs = Tokenizer(models.BPE(**model))
    theirs.pre_tokenizer = before
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(TEXTS * 2, trainer)
    return theirs


def of_json(steps):
    """The library's object for the JSON of a pre-tokenizer."""
    definition = {"version": "1.0", "added_tokens": [], "pre_tokenizer": steps}
    definition |= {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(json.dumps(definition)).pre_tokenizer


@pytest.mark.parametrize("pattern", PATTERNS)
@example(text="x  \n  ")
@example(text="a\n\n    b(\n\t\tc)  \r\n\u3000\u3000\u4ed6\u8bf4\uff0c\u3007\u4e00 1234 readLine")
@given(text=HARD)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_both_spellings_of_a_pattern_split_a_text_at_the_same_places(pattern, text):
    spelled = {character: bytes([byte]) for byte, character in byte_characters().items()}
    theirs = [
        b"".join(spelled[character] for character in piece).decode()
        for piece, _ in of_json(steps_of(pattern)).pre_tokenize_str(text)
    ]
    version = regex.V1 if "&&" in PATTERNS[pattern] else regex.V0
    ours = [match[0] for match in regex.finditer(PATTERNS[pattern], text, version)]
    assert ours == theirs


@pytest.fixture(scope="module", params=list(KNOWN))
def both(request, tmp_path_factory):
    """Ours and theirs, with one pattern."""
    folder = tmp_path_factory.mktemp("pattern")
    known = KNOWN[request.param]
    theirs = train(of_json(steps_of(request.param)), ignore_merges=known.ignore_merges)
    if known.normalisation:
        from tokenizers import normalizers

        theirs.normalizer = normalizers.NFC()
    theirs.save(str(folder / "tokenizer.json"))
    return request.param, load_tokenizer(folder), theirs


def test_each_pattern_has_a_name_in_ggufs_and_steps_in_hugging_faces_files():
    assert set(KNOWN) == set(PATTERNS)
    names = [pre for known in KNOWN.values() for pre in known.pre]
    assert len(names) == len(set(names))


def test_a_known_pattern_is_found_and_computed_by_tiktoken(both):
    pattern, ours, _ = both
    assert isinstance(ours, GPT2Tokenizer)
    assert ours.pattern == pattern


@settings(derandomize=True, deadline=None, max_examples=150)
@given(text=HARD)
@example(text="a  5  b 12\n\n 3\r\n  ")
@example(text=" (a, b).  c،  \n\u0301")
@example(text="I'M he'\u017f 'S  \n \n x/\n/ 12345")
def test_its_ids_are_the_librarys(both, text):
    _, ours, theirs = both
    assert ours.encode(text).tolist() == ids_of(theirs, text)


def test_its_ids_are_the_librarys_on_long_texts_and_all_bytes(both):
    _, ours, theirs = both
    for text in [*TEXTS, " " * 3000 + "x", "\n" * 3000, "ab" * 2000]:
        assert ours.encode(text).tolist() == ids_of(theirs, text), repr(text[:60])


def test_it_is_saved_exported_and_written_to_gguf_as_it_is(both, tmp_path):
    pattern, ours, _ = both
    (tmp_path / "own.json").write_text(tokenizers.to_json(ours))
    for name, content in hugging_face_files(ours).items():
        (tmp_path / name).write_text(content)
    again = [
        tokenizers.load(tmp_path / "own.json"),
        load_tokenizer(tmp_path, end_of_text=[ours.end_of_text]),
    ]
    if KNOWN[pattern].pre:
        metadata = tokenizer_metadata(ours, rows=ours.vocab_size + 3)
        assert metadata["tokenizer.ggml.pre"] == KNOWN[pattern].pre[0]
        again.append(tokenizer_of(tmp_path / "x.gguf", metadata, rows=ours.vocab_size + 3))
    else:
        with pytest.raises(UsageError, match=f"splits a text with '{pattern}', which has no name"):
            tokenizer_metadata(ours, rows=ours.vocab_size)
    for tokenizer in again:
        assert tokenizers.fingerprint(tokenizer) == tokenizers.fingerprint(ours)


def test_a_normalised_text_is_decoded_in_its_normal_form(both):
    pattern, ours, _ = both
    composed = "\u00e9" if KNOWN[pattern].normalisation else "e\u0301"
    assert decode(ours, ours.encode("e\u0301").tolist()) == composed


def test_a_pre_name_that_is_not_known_is_refused_with_the_known_ones(both, tmp_path):
    pattern, ours, _ = both
    if not KNOWN[pattern].pre:
        return
    metadata = tokenizer_metadata(ours, rows=ours.vocab_size) | {"tokenizer.ggml.pre": "words"}
    with pytest.raises(UsageError, match=r"x.gguf: .*pre is 'words'.* are gpt-2, .*llama-bpe"):
        tokenizer_of(tmp_path / "x.gguf", metadata, rows=ours.vocab_size)


def test_a_pattern_without_a_name_is_left_to_the_library(tmp_path):
    steps = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs = train(pre_tokenizers.Sequence(steps))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, LibraryTokenizer)
    for text in TEXTS:
        assert ours.encode(text).tolist() == ids_of(theirs, text)
    with pytest.raises(UsageError, match="has no name in GGUF; the patterns that have one are"):
        tokenizer_metadata(ours, rows=ours.vocab_size)


def test_bytes_that_a_vocabulary_lacks_are_left_out_as_the_library_does(tmp_path):
    theirs = train(of_json(steps_of("smollm")))
    definition = json.loads(theirs.to_str())
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    used = {part for merge in merges for part in merge}
    absent = [t for t in pre_tokenizers.ByteLevel.alphabet() if t not in used][:20]
    kept = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in absent]
    definition["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    ours, theirs = load_tokenizer(tmp_path), Tokenizer.from_str(json.dumps(definition))
    assert isinstance(ours, GPT2Tokenizer)
    assert len(ours.absent) == 20
    gone = "".join(chr(b) for b in ours.absent if b < 128)
    for text in [*TEXTS, f"t{gone}he {gone} 1{gone}2"]:
        assert ours.encode(text).tolist() == ids_of(theirs, text), repr(text)
    (tmp_path / "own.json").write_text(tokenizers.to_json(ours))
    again = tokenizers.load(tmp_path / "own.json")
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(ours)
