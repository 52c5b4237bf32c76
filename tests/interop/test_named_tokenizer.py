"""Tokenizers by name: files of each kind, folders, encodings."""

import io
import json
import os

import pytest
from tokenizers import Tokenizer

from gpt.config import DataConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.prepare import prepare
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, decode
from gpt.data.tokenizer_training import train_byte_pairs
from gpt.data.words import train_words
from gpt.interop.gguf_tokenizer import tokenizer_of
from gpt.interop.gguf_tokenizer_export import tokenizer_metadata
from gpt.interop.named_tokenizer import named_tokenizer
from gpt.interop.vocabulary_export import hugging_face_files
from tests.data.test_tokenizer import HARD_TEXT
from tests.data.test_tokenizer_training import CHINESE, TEXT

OWN = {
    "bpe": train_byte_pairs([TEXT], vocab_size=700, pattern="chinese", special_tokens=["<START>"]),
    "words": train_words([TEXT], unknown=False),
    "char": CharTokenizer(TEXT),
    "byte": ByteTokenizer(),
}


def equal(one, two):
    return tokenizers.fingerprint(one) == tokenizers.fingerprint(two)


@pytest.mark.parametrize("made", OWN.values(), ids=OWN)
def test_a_file_of_ours_is_loaded_with_any_name_and_by_its_folder(made, tmp_path):
    (tmp_path / "tok.json").write_text(tokenizers.to_json(made))
    (tmp_path / "tokenizer.json").write_text(tokenizers.to_json(made))
    assert equal(named_tokenizer(str(tmp_path / "tok.json")), made)
    assert equal(named_tokenizer(str(tmp_path)), made)


@pytest.mark.parametrize("made", [OWN["bpe"], OWN["char"]], ids=["bpe", "char"])
def test_a_file_of_hugging_face_is_loaded_with_any_name_and_by_its_folder(made, tmp_path):
    files = hugging_face_files(made)
    (tmp_path / "other.json").write_text(files["tokenizer.json"])
    assert equal(named_tokenizer(str(tmp_path / "other.json")), made)
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_text(content)
    assert equal(named_tokenizer(str(tmp_path / "folder")), made)


def test_vocab_json_and_merges_txt_are_a_tokenizer(tmp_path):
    made = train_byte_pairs([TEXT], vocab_size=600)
    model = json.loads(hugging_face_files(made)["tokenizer.json"])["model"]
    vocab = model["vocab"] | {"<|endoftext|>": made.end_of_text}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
    assert equal(named_tokenizer(str(tmp_path)), made)


def test_a_sentencepiece_model_is_loaded_and_prepares_a_text(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHINESE.splitlines()), model_writer=content, vocab_size=800,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", num_threads=1,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    made = named_tokenizer(str(tmp_path / "tokenizer.model"))
    assert equal(named_tokenizer(str(tmp_path)), made)
    (tmp_path / "text.txt").write_text(CHINESE)
    config = DataConfig(source=str(tmp_path / "text.txt"), tokenizer="x.model")
    prepared = prepare(config, tmp_path / "cache", tokenizer=made)
    ids = [*prepared.train.ids.tolist(), *prepared.validation.ids.tolist()]
    library = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    assert len(ids) - len(library.encode(CHINESE)) in (1, 2)  # end-of-text; a cut at the boundary
    assert decode(made, ids) == CHINESE


def test_byte_and_gpt2_are_known_by_name():
    assert named_tokenizer("byte").vocab_size == 257
    assert equal(named_tokenizer("gpt2"), GPT2Tokenizer.released())


def test_an_encoding_of_tiktoken_is_known_by_name(monkeypatch):
    from gpt.interop import named_tokenizer as module

    monkeypatch.setattr(module, "load_encoding", lambda name: name)
    assert named_tokenizer("cl100k_base") == "cl100k_base"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt3", r"data.tokenizer is 'gpt3', which is neither a file nor one of char, words, bpe"),
        ("bpe", r"'bpe', which is made from a text: gpt tokenizer train SOURCE --tokenizer bpe"),
        ("empty", r"data.tokenizer is the folder .*empty, which has none of tokenizer.json, vocab"),
        ("broken.json", r"tokenizer .*broken.json is not JSON"),
        ("list.json", r"broken|is not a JSON object"),
        ("kind.json", r"kind.json is broken: kind is 'x', and must be one of char, byte"),
        ("other.json", r"other.json is broken: kind is None"),
        ("model.json", r"model.json has model.type 'WordPiece', and must have BPE"),
        ("broken.model", r"tokenizer .*broken.model is broken: sentencepiece cannot read it"),
        ("ranks", r"ranks/tokenizer.model has tiktoken's ranks, as Llama 3's .model file, and"),
        ("empty.model", r"tokenizer .*empty.model is broken: it has no pieces"),
        ("fifo", r"the tokenizer .*fifo is a pipe or a device"),
        ("a\0b", r"data.tokenizer .* cannot be read|neither a file"),
    ],
)
def test_what_is_no_tokenizer_is_told_in_a_sentence(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "kind.json").write_text('{"kind": "x"}')
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "model.json").write_text('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}')
    (tmp_path / "broken.model").write_bytes(b"\x0a\xff")
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    (tmp_path / "empty.model").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=said):
        named_tokenizer(name)


def test_transformers_reads_an_exported_tokenizer_with_the_same_ids(tmp_path):
    from transformers import PreTrainedTokenizerFast

    made = OWN["bpe"]
    path = tmp_path / "tokenizer.json"
    path.write_text(hugging_face_files(made)["tokenizer.json"])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    for text in [*HARD_TEXT, TEXT]:
        ids = made.encode(text).tolist()
        if "<|endoftext|>" not in text:
            assert theirs(text)["input_ids"] == ids
        assert library.encode(text).ids == ids
    assert theirs("<START>")["input_ids"] == [made.special["<START>"]]


def test_characters_with_unknown_are_exported_and_read_back(tmp_path):
    made = CharTokenizer("abc d", unknown=True)
    path = tmp_path / "tokenizer.json"
    path.write_text(hugging_face_files(made)["tokenizer.json"])
    assert equal(named_tokenizer(str(path)), made)
    assert (
        Tokenizer.from_file(str(path)).encode("a\u6771 d").ids == made.encode("a\u6771 d").tolist()
    )
    metadata = tokenizer_metadata(made, rows=made.vocab_size)
    back = tokenizer_of(tmp_path / "x.gguf", metadata, rows=made.vocab_size)
    assert back.encode("a\u6771 d").tolist() == made.encode("a\u6771 d").tolist()


@pytest.mark.parametrize("export", [hugging_face_files, lambda t: tokenizer_metadata(t, rows=999)])
def test_words_have_no_form_in_other_projects_files(export):
    with pytest.raises(UsageError, match="a words tokenizer cannot be (exported|written)"):
        export(OWN["words"])
