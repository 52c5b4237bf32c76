"""Vocabularies of SentencePiece's kind (Llama, Mistral, Gemma) and GPT-1's, from Hugging Face and
GGUF.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import gpt
from gpt.config import DataConfig, ModelConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import open_corpus
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.data.prepare import prepare
from gpt.data.tokenizer import decode, encoder, prompt_ids
from gpt.evaluation.likelihood import encode_pair
from gpt.evaluation.perplexity import encode_text
from gpt.generation.text import GrowingText, encode_prompt
from gpt.interop.gguf_tokenizer import tokenizer_of
from gpt.interop.gguf_tokenizer_export import tokenizer_metadata
from gpt.interop.vocabulary import load_tokenizer
from gpt.interop.vocabulary_export import hugging_face_files
from tests.data.test_tokenizer import HARD_TEXT
from tests.interop.test_vocabulary import NOISE, ids_of

SPACE = "\u2581"
BACK = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
FALLBACK = [BACK, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CTC = {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
SHAPES = {
    "llama": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE],
        },
        "decoder": {"type": "Sequence", "decoders": [*FALLBACK, STRIP]},
    },
    "mistral": {
        "pre_tokenizer": METASPACE,
        "decoder": {"type": "Sequence", "decoders": [*FALLBACK, STRIP]},
    },
    "gemma": {
        "normalizer": REPLACE,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": FALLBACK},
    },
}
TEXTS = [*HARD_TEXT, *NOISE, "plain words, and plain words again", " a", "a\nb", SPACE]


def vocabulary():
    """Pieces and merges in their order, trained on the texts with spaces written as they are in
    SentencePiece's files.
    """
    theirs = Tokenizer(models.BPE())
    theirs.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    theirs.train_from_iterator([text for text in TEXTS if text.isascii()] * 3, trainer)
    model = json.loads(theirs.to_str())["model"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [p for p in sorted(model["vocab"], key=model["vocab"].__getitem__) if p != SPACE]
    tokens = ["<unk>", "<s>", "</s>", *pieces, SPACE, "<turn>", "<tool>"]
    return {token: i for i, token in enumerate(tokens)}, model["merges"]


VOCAB, MERGES = vocabulary()


def definition_of(shape):
    """A tokenizer.json in the style of a released one."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"<unk>": True, "<s>": True, "</s>": True, "<turn>": True, "<tool>": False}
    first = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": VOCAB[token], "content": token, "special": is_special, **flags}
            for token, is_special in special.items()
        ],
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": first,
        },
        **SHAPES[shape],
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": VOCAB, "merges": MERGES,
        },
    }  # fmt: skip


@pytest.fixture(scope="module", params=list(SHAPES))
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.json").write_text(json.dumps(definition_of(request.param)))
    ours = load_tokenizer(folder, end_of_text=[VOCAB["</s>"], VOCAB["<turn>"]])
    return ours, Tokenizer.from_file(str(folder / "tokenizer.json"))


def streamed(tokenizer, ids):
    """The text of successive tokens, as a generated text is shown."""
    growing = GrowingText(tokenizer, begins=True)
    return "".join([growing.add(int(i)) for i in ids]) + growing.finish()


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    text=st.text(st.sampled_from("ab T\n\t<>s/é東\U0001f600\u0301") | st.characters(), max_size=30)
)
@example(text="  two  spaces ")
@example(text="</s> <s>is text<turn> and <tool>")
def test_ids_and_texts_are_the_librarys_and_what_is_streamed_is_the_text(both, text):
    ours, theirs = both
    text = text.encode(errors="replace").decode().replace(SPACE, "_")
    ids = ours.encode(text)
    assert prompt_ids(ours, text) == [1, *ids] == ids_of(theirs, text)
    back = theirs.decode(ids.tolist(), skip_special_tokens=False)
    assert decode(ours, ids) == streamed(ours, ids) == back
    assert back == text or takes_a_space(ours, text)


def takes_a_space(tokenizer, text):
    """Whether a text begins with the space that Metaspace would put before it."""
    return tokenizer.definition.get("pre_tokenizer") == METASPACE and text.startswith((" ", SPACE))


def test_a_text_begins_with_the_first_token_and_special_ones_have_no_text(both):
    ours, _ = both
    assert isinstance(ours, LibraryTokenizer)
    assert ours.first == (1,)
    assert encode_prompt(ours, "") == [1]
    assert encode_prompt(ours, "a")[0] == 1
    assert encode_prompt(ours, [5]) == [5]
    assert ours.ends == {VOCAB["</s>"], VOCAB["<turn>"]}
    assert (
        ours.decode_bytes([0, 1, 2, VOCAB["<turn>"], VOCAB["<tool>"], VOCAB["<0x0A>"]])
        == b"<tool>\n"
    )


def test_a_later_piece_of_a_document_continues_it(both):
    ours, _ = both
    for text in TEXTS:
        text = text.replace(SPACE, "_")
        pieces = [text[:7], text[7:]] if text[7:] else [text]
        ids = [i for n, piece in enumerate(pieces) for i in encoder(ours, begins=n == 0)(piece)]
        assert ids[0] == 1
        assert decode(ours, ids) == text or takes_a_space(ours, text)


def test_each_document_of_training_and_evaluation_begins_with_the_first_token(both, tmp_path):
    ours, _ = both
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(f"plain words of {name}\n" * 20)
    config = DataConfig(source=str(tmp_path / "texts"), validation_fraction=0.1)
    ids = np.array(prepare(config, tmp_path / "cache", tokenizer=ours).train.ids).tolist()
    evaluated = encode_text(ours, open_corpus(str(tmp_path / "texts"))).tolist()
    for found in (ids, evaluated):
        starts = [i for i, token in enumerate(found) if token == 1]
        assert starts[0] == 0
        assert len(starts) == 2
        assert found[starts[1] - 1] == ours.end_of_text
    assert encode_pair(ours, "", "plain").context == [1]
    assert encode_pair(ours, "plain", " words").context[0] == 1


@pytest.mark.parametrize("way", ["saved", "exported", "gguf"])
def test_it_is_saved_exported_and_written_to_gguf_with_the_same_ids(both, way, tmp_path):
    ours, _ = both
    if way == "saved":
        (tmp_path / "own.json").write_text(tokenizers.to_json(ours))
        again = tokenizers.load(tmp_path / "own.json")
        assert tokenizers.fingerprint(again) == tokenizers.fingerprint(ours)
    elif way == "exported":
        for name, content in hugging_face_files(ours).items():
            (tmp_path / name).write_text(content)
        again = load_tokenizer(tmp_path, end_of_text=sorted(ours.ends))
    else:
        metadata = tokenizer_metadata(ours, rows=ours.vocab_size + 2)
        again = tokenizer_of(tmp_path / "x.gguf", metadata, rows=ours.vocab_size + 2)
    assert again.ends == ours.ends
    assert again.first == ours.first
    for text in TEXTS:
        if way == "gguf" and takes_a_space(ours, text):  # GGUF does not say that
            continue
        assert again.encode(text).tolist() == ours.encode(text).tolist(), repr(text)
        assert decode(again, again.encode(text)) == decode(ours, ours.encode(text))


def test_a_model_with_a_vocabulary_of_sentencepiece_generates_what_it_streams(both):
    ours, _ = both
    torch.manual_seed(0)
    shape = {"context_length": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = gpt.GPT(ModelConfig(vocab_size=ours.vocab_size, **shape)).eval(), ours
    [made] = gpt.generate(model, "plain words", temperature=2, max_new_tokens=30, seed=1)
    pieces = gpt.stream(model, "plain words", temperature=2, max_new_tokens=30, seed=1)
    assert "".join(pieces) == made.text


def test_gpt_1s_vocabulary_lower_cases_and_ends_words(tmp_path):
    theirs = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    theirs.normalizer = normalizers.BertNormalizer(lowercase=True)
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    theirs.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    theirs.train_from_iterator(HARD_TEXT * 3, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, LibraryTokenizer)
    for text in [*HARD_TEXT, *NOISE]:
        assert ours.encode(text).tolist() == ids_of(theirs, text)
    ids = ours.encode("But, SOFT window").tolist()
    assert decode(ours, ids).strip() == theirs.decode(ids) == "but , soft window"


def test_tokenizer_model_alone_is_refused_with_the_way_to_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(
        UsageError, match=r"tokenizer.model alone, and tokenizer.json is needed: .*save_"
    ):
        load_tokenizer(tmp_path)


def test_a_missing_library_is_told_with_its_name(both, monkeypatch, tmp_path):
    (tmp_path / "own.json").write_text(tokenizers.to_json(both[0]))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UsageError, match="needs the package tokenizers: pip install tokenizers"):
        tokenizers.load(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"definition": None}, "its model must be of the type BPE"),
        ({"definition": {"model": {"type": "Unigram"}}}, "its model must be of the type BPE"),
        ({"decoder": CTC}, "its decoder has {'type': 'CTC'"),
        ({"decoder": None}, "its decoder is None"),
        ({"added_tokens": [{"content": "<x>", "id": 10**9, "special": True}]}, "ids from 0 to"),
        ({"added_tokens": [{"content": 5}]}, "added_tokens must have content"),
        ({"normalizer": {"type": "Nonsense"}}, "tokenizers cannot read it"),
        ({"end_of_text": 10**6}, "must be ids of its tokens"),
        ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000"),
        ({"first": "a"}, "first is 'a', and must be a list of ids"),
        ({"chat": {"templates": {"default": 5}}}, "chat is"),
    ],
)
def test_a_saved_one_that_could_not_be_one_of_ours_is_told_why(changes, said, both, tmp_path):
    state = json.loads(tokenizers.to_json(both[0]))
    inner = {k: v for k, v in changes.items() if k in ("decoder", "added_tokens", "normalizer")}
    state["definition"] |= inner
    state |= {k: v for k, v in changes.items() if k not in inner}
    (tmp_path / "own.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match=f"own.json is broken: .*{said}"):
        tokenizers.load(tmp_path / "own.json")


def metadata(**changes):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    types, scores = [2, 3, 3, 1, 1, 1], [0.0, 0.0, 0.0, -2.0, -3.0, -1.0]
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    values |= {"bos_token_id": 1, "eos_token_id": 2} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def test_ggufs_scores_decide_what_is_merged(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "x.gguf", metadata(add_space_prefix=False), rows=8)
    assert tokenizer.encode("abba").tolist() == [5, 4, 3]
    assert (tokenizer.first, tokenizer.ends) == ((1,), {2})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert', and must have gpt2 or llama"),
        ({"tokens": []}, "0 tokens and 6 types"),
        ({"tokens": None}, "tokens None, which must be a list of str"),
        ({"tokens": ["a"] * 6}, "the same token twice"),
        ({"token_type": [1]}, "6 tokens and 1 types"),
        ({"token_type": "x"}, "token_type 'x', which must be a list of int"),
        ({"scores": [0.0]}, "must have a score for each token"),
        ({"scores": ["a"] * 6}, "scores .* which must be a list of float"),
        ({"bos_token_id": 6}, "bos_token_id 6, which must be the id of a token"),
        ({"eos_token_id": "a"}, "eos_token_id 'a'"),
        ({"add_bos_token": 1}, "add_bos_token 1, which must be true or false"),
        ({"add_eos_token": True}, "add_eos_token true, and must have false"),
        ({"model": "gpt2", "pre": 5}, "tokenizer.ggml.pre is 5"),
        ({"model": "gpt2", "pre": "gpt-2"}, "merges None, which must be a list"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["x y"]}, "parts that are not tokens"),
    ],
)
def test_metadata_that_is_broken_is_refused(changes, said, tmp_path):
    with pytest.raises(UsageError, match=f"x.gguf.*{said}"):
        tokenizer_of(tmp_path / "x.gguf", metadata(**changes), rows=6)
