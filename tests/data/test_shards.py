import numpy as np
import pytest

from gpt.config import UsageError
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
    shard = read_shard(path, tokenizer=TOKENIZER)
    assert shard.ids.tolist() == [1, 2, vocab_size - 1]
    assert shard.corpus == CORPUS
    assert path.stat().st_size == HEADER_BYTES + 3 * item_bytes


def test_an_empty_shard_is_read(tmp_path):
    write(tmp_path / "a.bin", [])
    assert len(read_shard(tmp_path / "a.bin", tokenizer=TOKENIZER)) == 0


def test_a_truncated_shard_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [range(100)])
    whole = path.read_bytes()
    for size in (len(whole) - 1, HEADER_BYTES, HEADER_BYTES - 1, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"a\.bin is (truncated|not a token shard)"):
            read_shard(path, tokenizer=TOKENIZER)


def test_a_shard_whose_writing_failed_is_refused(tmp_path):
    def chunks():
        yield range(9)
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write(tmp_path / "a.bin", chunks())
    with pytest.raises(UsageError, match="its writing was cut off"):
        read_shard(tmp_path / "a.bin", tokenizer=TOKENIZER)


def test_a_shard_of_another_tokenizer_is_refused_and_both_are_named(tmp_path):
    write(tmp_path / "a.bin", [[1]])
    with pytest.raises(UsageError) as error:
        read_shard(tmp_path / "a.bin", tokenizer=CORPUS)
    assert TOKENIZER.hex()[:12] in str(error.value)
    assert CORPUS.hex()[:12] in str(error.value)


def test_a_shard_of_a_later_format_or_a_missing_one_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, [[1]])
    raw = bytearray(path.read_bytes())
    raw[8] = 2
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="has format 2, and this program reads 1"):
        read_shard(path, tokenizer=TOKENIZER)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_shard(tmp_path / "b.bin", tokenizer=TOKENIZER)
