import os
import stat
import sys

import numpy as np
import pytest

from gpt.config import DataConfig, UsageError
from gpt.data import formats
from gpt.data import prepare as preparing
from gpt.data.prepare import prepare
from gpt.data.shards import HEADER_BYTES, ShardWriter
from gpt.data.tokenizer import CharTokenizer, decode


def texts(prepared):
    return [
        decode(prepared.tokenizer, s.ids.tolist()) for s in (prepared.train, prepared.validation)
    ]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_the_held_out_text_is_the_end_whatever_the_tokenizer(tokenizer, text_file, tmp_path):
    text = text_file.read_text()
    config = DataConfig(source=str(text_file), tokenizer=tokenizer, validation_fraction=0.1)
    train, validation = texts(prepare(config, tmp_path / "cache"))
    assert (train, validation) == (text[: len(train)], text[len(train) :])
    assert len(validation) == round(0.1 * len(text))


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_each_document_ends_with_end_of_text_on_its_side_of_the_boundary(
    piece, tmp_path, monkeypatch
):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", piece)
    source = tmp_path / "source"
    source.mkdir()
    for name, text in {"a": "a b c d e", "b": "", "c": "f g h i j", "d": "k l m n o"}.items():
        (source / name).write_text(text)
    config = DataConfig(source=str(source), tokenizer="byte", validation_fraction=8 / 27)
    prepared = prepare(config, tmp_path / "cache")
    end = [256]
    assert prepared.train.ids.tolist() == [*b"a b c d e", *end, *b"f g h i j", *end, *b"k"]
    assert prepared.validation.ids.tolist() == [*b" l m n o", *end]
    config = DataConfig(source=str(source), tokenizer="byte", validation_fraction=9 / 27)
    prepared = prepare(config, tmp_path / "cache")
    assert prepared.train.ids.tolist() == [*b"a b c d e", *end, *b"f g h i j", *end]


def test_a_prepared_text_is_found_again_by_its_content(text_file, tmp_path):
    config = DataConfig(source=str(text_file))
    first = prepare(config, tmp_path / "cache")
    stamp = first.train.path.stat().st_mtime_ns
    os.utime(text_file)
    assert prepare(config, tmp_path / "cache").train.path.stat().st_mtime_ns == stamp
    text_file.write_text(text_file.read_text() + "More.\n")
    second = prepare(config, tmp_path / "cache")
    assert second.train.path != first.train.path
    assert texts(second)[1].endswith("More.\n")
    assert prepare(
        DataConfig(source=str(text_file), tokenizer="byte"), tmp_path / "cache"
    ).train.path
    assert len(list((tmp_path / "cache").iterdir())) == 3


READ: list[str] | None = None
"""The files that are opened while a test counts them."""


def note(event, arguments):
    if event == "open" and READ is not None:
        READ.append(str(arguments[0]))


sys.addaudithook(note)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_a_text_is_read_twice_to_prepare_it_and_once_to_find_it_again(
    tokenizer, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        (source / name).write_text(f"the {name} sat on the mat\n" * 500)
    config = DataConfig(source=str(source), tokenizer=tokenizer)
    for times in (2, 1):
        monkeypatch.setattr(sys.modules[__name__], "READ", read := [])
        prepare(config, tmp_path / "cache")
        monkeypatch.undo()
        assert [read.count(str(source / name)) for name in "abc"] == [times] * 3


def test_a_preparation_that_fails_leaves_nothing_behind(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good text " * 10 + b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        prepare(DataConfig(source=str(bad)), tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


@pytest.mark.parametrize("source", ["file", "folder"])
def test_an_empty_text_is_refused(source, tmp_path):
    path = tmp_path / "source"
    if source == "folder":
        path.mkdir()
        (path / "a.txt").touch()
    else:
        path.touch()
    with pytest.raises(UsageError, match="has no text"):
        prepare(DataConfig(source=str(path)), tmp_path / "cache")


def test_a_given_tokenizer_takes_the_place_of_the_configurations(text_file, tmp_path):
    given = CharTokenizer(text_file.read_text() + "@#")
    config = DataConfig(source=str(text_file))
    own = prepare(config, tmp_path / "cache")
    other = prepare(config, tmp_path / "cache", tokenizer=given)
    assert other.tokenizer.vocab_size == own.tokenizer.vocab_size + 2
    assert other.train.path != own.train.path
    assert texts(other) == texts(own)


def test_progress_rises_to_one(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 1000)
    shares = []
    prepare(DataConfig(source=str(text_file)), tmp_path / "cache", progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) > 5


def test_shards_whose_tokenizer_was_changed_are_refused(text_file, tmp_path):
    config = DataConfig(source=str(text_file))
    folder = prepare(config, tmp_path / "cache").train.path.parent
    (folder / "tokenizer.json").write_text('{"kind": "byte"}')
    with pytest.raises(UsageError, match="was made with the tokenizer"):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json"])
def test_a_file_that_was_deleted_is_prepared_again(name, text_file, tmp_path):
    config = DataConfig(source=str(text_file))
    first = prepare(config, tmp_path / "cache")
    expected = texts(first)
    (first.train.path.parent / name).unlink()
    assert texts(prepare(config, tmp_path / "cache")) == expected


@pytest.mark.parametrize("damage", ["changed", "outside"])
def test_shards_whose_ids_were_damaged_are_refused_by_name(damage, text_file, tmp_path):
    config = DataConfig(source=str(text_file))
    path = prepare(config, tmp_path / "cache").validation.path
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 1] = 0xFF if damage == "outside" else 0
    raw[HEADER_BYTES] ^= 1
    path.write_bytes(raw)
    said = "index 0 .* must be below" if damage == "outside" else "its checksum"
    with pytest.raises(UsageError, match=rf"validation\.bin is damaged: .*{said}"):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json"])
def test_a_pipe_among_the_prepared_files_is_refused_and_not_waited_for(name, text_file, tmp_path):
    config = DataConfig(source=str(text_file))
    path = prepare(config, tmp_path / "cache").train.path.with_name(name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=f"{name} is a pipe or a device"):
        prepare(config, tmp_path / "cache")


def test_prepared_folders_have_the_users_umask(text_file, tmp_path):
    before = os.umask(0o027)
    try:
        folder = prepare(DataConfig(source=str(text_file)), tmp_path / "cache").train.path.parent
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(text_file, tmp_path, monkeypatch):
    def full(self, ids):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    said = r"cache/text-char-[0-9a-f]{12} cannot be written: No space left on device"
    with pytest.raises(UsageError, match=said):
        prepare(DataConfig(source=str(text_file)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_a_file_is_told(text_file, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UsageError, match="cache/text-char-.* cannot be written: "):
        prepare(DataConfig(source=str(text_file)), tmp_path / "cache")


def test_a_text_that_another_run_has_prepared_meanwhile_is_taken(text_file, tmp_path, monkeypatch):
    config, write = DataConfig(source=str(text_file)), preparing._write

    def overtaken(*arguments):
        monkeypatch.setattr(preparing, "_write", write)
        theirs.append(prepare(config, tmp_path / "cache"))
        write(*arguments)

    theirs = []
    monkeypatch.setattr(preparing, "_write", overtaken)
    ours = prepare(config, tmp_path / "cache")
    assert np.array_equal(ours.train.ids, theirs[0].train.ids)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_long_name_of_a_text_is_cut_in_the_name_of_its_folder(tmp_path):
    source = tmp_path / ("\u6771" * 80 + ".txt")
    source.write_text("the cat " * 9)
    prepared = prepare(DataConfig(source=str(source), tokenizer="byte"), tmp_path / "cache")
    assert prepared.train.path.parent.name.startswith("\u6771" * 40 + "-byte-")
