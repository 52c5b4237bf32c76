import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import UsageError
from gpt.data import shards
from gpt.data.shards import HEADER_BYTES, ShardWriter, read_shard

TOKENIZER, CORPUS = bytes(range(32)), bytes(range(32, 64))


def write(path, chunks, vocab_size=300):
    with ShardWriter(path, vocab_size=vocab_size, tokenizer=TOKENIZER, corpus=CORPUS) as writer:
        for chunk in chunks:
            writer.write(np.array(chunk, np.uint32))


@pytest.mark.parametrize(("vocab_size", "item_bytes"), [(300, 2), (65_536, 2), (65_537, 4)])
def test_what_is_written_is_read_in_as_few_bytes_as_the_vocabulary_needs(
    vocab_size, item_bytes, tmp_path
):
    path = tmp_path / "a.bin"
    write(path, [[1, 2], [], [vocab_size - 1]], vocab_size)
    shard = read_shard(path, tokenizer=TOKENIZER, vocab_size=vocab_size)
    assert shard.ids.tolist() == [1, 2, vocab_size - 1]
    assert shard.corpus == CORPUS
    assert path.stat().st_size == HEADER_BYTES + 3 * item_bytes


def test_an_empty_shard_is_read(tmp_path):
    write(tmp_path / "a.bin", [])
    assert len(read_shard(tmp_path / "a.bin", tokenizer=TOKENIZER, vocab_size=300)) == 0


def test_a_truncated_shard_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [range(100)])
    whole = path.read_bytes()
    for size in (len(whole) - 1, HEADER_BYTES, HEADER_BYTES - 1, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"a\.bin is (truncated|not a token shard)"):
            read_shard(path, tokenizer=TOKENIZER, vocab_size=300)


def test_a_shard_whose_writing_failed_is_refused(tmp_path):
    def chunks():
        yield range(9)
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write(tmp_path / "a.bin", chunks())
    with pytest.raises(UsageError, match="it is incomplete"):
        read_shard(tmp_path / "a.bin", tokenizer=TOKENIZER, vocab_size=300)


def test_a_shard_of_another_tokenizer_is_refused_and_both_are_named(tmp_path):
    write(tmp_path / "a.bin", [[1]])
    with pytest.raises(UsageError) as error:
        read_shard(tmp_path / "a.bin", tokenizer=CORPUS, vocab_size=300)
    assert TOKENIZER.hex()[:12] in str(error.value)
    assert CORPUS.hex()[:12] in str(error.value)


def test_a_shard_of_a_later_format_or_a_missing_one_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [[1]])
    raw = bytearray(path.read_bytes())
    raw[8] = 3
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="has format 3, and this program reads formats 1 and 2"):
        read_shard(path, tokenizer=TOKENIZER, vocab_size=300)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_shard(tmp_path / "b.bin", tokenizer=TOKENIZER, vocab_size=300)


def as_version_1(raw):
    """The shard as it was written before shards had checksums."""
    return raw[:8] + bytes([1]) + raw[9:96] + bytes(4) + raw[100:]


def test_a_changed_id_is_noticed(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [range(100), range(50)])
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 2 * 120] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"a\.bin is damaged: its checksum .* prepare it again"):
        read_shard(path, tokenizer=TOKENIZER, vocab_size=300)


@pytest.mark.parametrize("version", [1, 2])
def test_an_id_outside_of_the_vocabulary_is_named_with_its_place(version, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", 64)
    path = tmp_path / "a.bin"
    write(path, [range(200)])
    raw = path.read_bytes()
    raw = raw if version == 2 else as_version_1(raw)
    place = HEADER_BYTES + 2 * 150
    path.write_bytes(raw[:place] + b"\x2c\x01" + raw[place + 2 :])
    with pytest.raises(UsageError, match=r"a\.bin .* index 150 is 300, .* below 300"):
        read_shard(path, tokenizer=TOKENIZER, vocab_size=300)


def test_a_shard_without_a_checksum_is_read_as_before(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [range(100)])
    path.write_bytes(as_version_1(path.read_bytes()))
    assert read_shard(path, tokenizer=TOKENIZER, vocab_size=300).ids.tolist() == [*range(100)]


def test_a_header_with_one_byte_an_id_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [range(100)])
    raw = bytearray(path.read_bytes())
    raw[12] = 1
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"a\.bin has 1 bytes per id, and must have 2 or 4"):
        read_shard(path, tokenizer=TOKENIZER, vocab_size=300)


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"a\.bin is a pipe or a device"):
        read_shard(tmp_path / "a.bin", tokenizer=TOKENIZER, vocab_size=300)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "a.bin"
    write(path, [range(100)])
    return path, path.read_bytes()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data(), version=st.sampled_from([1, 2]))
def test_whatever_a_shard_holds_its_ids_are_in_the_vocabulary_or_it_is_refused(
    data, version, shard
):
    path, raw = shard
    raw = bytearray(raw if version == 2 else as_version_1(raw))
    whole = bytes(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 110) | st.integers(0, len(raw) - 1))] = data.draw(
            st.integers(0, 255)
        )
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, 255, 99, 9, 0]))]
    path.write_bytes(raw)
    try:
        ids = read_shard(path, tokenizer=TOKENIZER, vocab_size=300).ids
    except UsageError as error:
        assert "a.bin" in str(error)  # noqa: PT017
    else:
        assert (ids < 300).all()
        if version == 2 and raw[8] == 2:
            assert raw[:100] + raw[HEADER_BYTES:] == whole[:100] + whole[HEADER_BYTES:]
