"""nanoGPT's, llm.c's and modded-nanogpt's files, read in place."""

import numpy as np
import pytest

from gpt.config import DataConfig, UsageError
from gpt.data.prepare import prepare
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import GPT2Tokenizer


def bare(path, ids):
    np.array(ids, "<u2").tofile(path)


def with_header(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


FORMATS = {
    "nanoGPT": (bare, "train.bin", "val.bin"),
    "llm.c": (with_header, "tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"),
    "modded-nanogpt": (with_header, "fineweb_train_000001.bin", "fineweb_val_000000.bin"),
}


def opened(source, tmp_path):
    return prepare(DataConfig(source=str(source), tokenizer="gpt2"), tmp_path / "cache")


@pytest.mark.parametrize("name", FORMATS)
def test_the_ids_are_read_in_place(name, tmp_path):
    write, train, validation = FORMATS[name]
    ids = GPT2Tokenizer.released().encode("First Citizen: Before we proceed any further").tolist()
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / train, ids)
    write(folder / validation, ids[:5])
    write(folder / train.replace("1.bin", "2.bin").replace("train.bin", "train2.bin"), ids[::-1])
    for source in (folder, folder / "*.bin"):
        data = opened(source, tmp_path)
        assert data.train.read(0, 99).tolist() == ids + ids[::-1]
        assert data.validation.read(0, 99).tolist() == ids[:5]
        assert data.tokenizer.vocab_size == 50257
    assert not (tmp_path / "cache").exists()
    assert opened(folder, tmp_path).train.corpus == opened(folder, tmp_path).train.corpus
    write(folder / train, ids[1:])
    assert opened(folder, tmp_path).train.corpus != data.train.corpus


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val.bin").unlink(), "no .bin file for val"),
        (lambda f: (f / "train.bin").unlink(), "no .bin file for train"),
        (lambda f: (f / "train.bin").write_bytes(b"abc"), "has 3 bytes, which are not ids of 16"),
        (lambda f: (f / "train.bin").write_bytes(b""), "has 0 bytes"),
        (lambda f: bare(f / "train.bin", [1, 60000]), r"the id 60,000 at index 1, and GPT-2's"),
        (lambda f: with_header(f / "train.bin", [1, 2], count=3), "is truncated: it has 1,028"),
        (lambda f: with_header(f / "train.bin", [1, 2], count=-1), "is truncated"),
        (lambda f: with_header(f / "train.bin", [1, 2], version=2), "has version 2, and must"),
        (
            lambda f: with_header(f / "train.bin", [1, 2], 20240801, 7),
            "with Llama 3's ids, and only",
        ),
        (lambda f: (f / "val.bin").rename(f / "medieval.bin"), "no .bin file for val"),
        (lambda f: (f / "meta.pkl").write_bytes(b""), "a pickle is never read"),
    ],
)
def test_files_that_cannot_be_used_are_one_sentence(spoil, message, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        bare(folder / name, [1, 2, 3])
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        opened(folder, tmp_path)


@pytest.mark.parametrize(
    "name", ["val.bin", "fineweb_val_000000.bin", "Validation-1.bin", "tiny_shakespeare_val.bin"]
)
def test_validation_files_are_those_with_the_word_in_their_names(name, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    bare(folder / name, [1, 2, 3])
    bare(folder / "medieval_interval.bin", [4, 5])
    data = opened(folder, tmp_path)
    assert data.validation.read(0, 9).tolist() == [1, 2, 3]
    assert data.train.read(0, 9).tolist() == [4, 5]


def test_a_model_with_another_tokenizer_is_refused(tmp_path):
    from gpt.data.tokenizer import ByteTokenizer

    for name in ("train.bin", "val.bin"):
        bare(tmp_path / name, [1, 2, 3])
    with pytest.raises(UsageError, match="GPT-2's token ids, and the model has another"):
        prepare(DataConfig(source=str(tmp_path)), tmp_path / "cache", tokenizer=ByteTokenizer())


def test_a_folder_of_texts_with_a_bin_file_is_a_folder_of_texts(tmp_path):
    bare(tmp_path / "model.bin", [1, 2, 3])
    (tmp_path / "a.txt").write_text("text")
    assert not is_token_files(str(tmp_path))
