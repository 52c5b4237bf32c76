import dataclasses
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.config import UsageError
from gpt.data.batches import IGNORED, Batch, TextWindows
from gpt.data.order import Order
from gpt.data.shards import Shard, Shards, ShardWriter, read_shard


def windows_of(tmp_path, n_tokens, context_length):
    path = tmp_path / "train.bin"
    with ShardWriter(path, vocab_size=1 << 20, tokenizer=bytes(32), corpus=bytes(32)) as writer:
        writer.write(np.arange(n_tokens))
    return TextWindows(read_shard(path, tokenizer=bytes(32), vocab_size=1 << 20), context_length)


def test_targets_are_the_tokens_that_follow(tmp_path):
    windows = windows_of(tmp_path, 21, 5)
    batch = windows.batch(np.array([0, 3]))
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5], [16, 17, 18, 19, 20]]
    assert batch.tokens.dtype == torch.int64


@pytest.mark.parametrize(("n_tokens", "count"), [(6, 1), (10, 1), (11, 2), (21, 4)])
def test_a_shard_has_every_window_that_has_a_next_token(n_tokens, count, tmp_path):
    assert len(windows_of(tmp_path, n_tokens, 5)) == count


def test_a_text_too_short_for_one_window_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has 5 tokens, and one window .* 5 needs 6"):
        windows_of(tmp_path, 5, 5)


def test_a_split_batch_is_the_batch_in_order(tmp_path):
    batch = windows_of(tmp_path, 101, 10).batch(np.arange(7))
    parts = list(batch.split(3))
    assert [len(p.tokens) for p in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_goes_to_cuda_as_one_contiguous_pinned_tensor(masked, tmp_path, monkeypatch):
    batch = windows_of(tmp_path, 101, 10).batch(np.arange(7))
    if masked:
        batch = Batch(batch.tokens, batch.targets.masked_fill(batch.targets % 2 == 0, IGNORED))
    pinned, copied = [], []

    def pin(tensor):
        pinned.append(tensor.is_contiguous())
        return tensor

    def copy(tensor, device, *, non_blocking):
        copied.append((str(device), non_blocking))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    [part, *_] = batch.split(4)
    there = part.to(torch.device("cuda"))
    assert (pinned, copied) == ([True], [("cuda", True)])
    assert torch.equal(there.tokens, part.tokens)
    assert torch.equal(there.targets, part.targets)


@pytest.mark.parametrize(
    ("n", "chosen"), [(0, range(10)), (1, [0]), (4, [0, 2, 5, 7]), (9, range(9)), (99, range(10))]
)
def test_validation_windows_are_spread_evenly(n, chosen, tmp_path):
    assert windows_of(tmp_path, 101, 10).spread(n).tolist() == list(chosen)


def test_pages_are_released_after_some_reads(tmp_path, monkeypatch):
    shard = windows_of(tmp_path, 2000, 5).shard
    calls = []

    class Memory:
        def madvise(self, advice):
            calls.append(advice)

    shard = dataclasses.replace(shard, memory=Memory())
    monkeypatch.setattr("gpt.data.shards.RELEASED", 10)
    for start in range(25):
        assert shard.read(start, 3).tolist() == [start, start + 1, start + 2]
    assert calls == [mmap.MADV_DONTNEED] * 2


def test_pages_of_several_shards_are_released_together(tmp_path, monkeypatch):
    shard = windows_of(tmp_path, 2000, 5).shard
    released = []

    class Memory:
        def __init__(self, name):
            self.name = name

        def madvise(self, advice):
            released.append(self.name)

    parts = [Shard(shard.path, shard.ids, shard.corpus, Memory(name)) for name in "abc"]
    monkeypatch.setattr("gpt.data.shards.RELEASED", 4)
    shards = Shards(tmp_path, parts, bytes(32))
    for start in (0, 10, 4500, 20):  # of the first and the third
        shards.read(start, 3)
    assert released == ["a", "c"]


def resident_file_pages():
    """MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1]) / 1024
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory")
def test_resident_memory_is_bounded_over_100_000_batches(tmp_path):
    path = tmp_path / "large.bin"
    ids = np.arange(1 << 20)
    with ShardWriter(path, vocab_size=1 << 20, tokenizer=bytes(32), corpus=bytes(32)) as writer:
        for _ in range(128):  # 512 MB
            writer.write(ids)
    windows = TextWindows(read_shard(path, tokenizer=bytes(32), vocab_size=1 << 20), 64)
    order = Order(len(windows), batch_size=4, seed=0)
    before = most = resident_file_pages()
    for step in range(100_000):
        batch = windows.batch(order.step(step))
        if step % 997 == 0:
            most = max(most, resident_file_pages())
            assert batch.targets[0, 0] == (batch.tokens[0, 0] + 1) % (1 << 20)
    assert most - before < 200
