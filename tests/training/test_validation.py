import contextlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt.data.batches import TextWindows
from gpt.data.shards import ShardWriter, read_shard
from gpt.training.parallel import World
from gpt.training.validation import score


@pytest.fixture
def windows(tmp_path):
    path = tmp_path / "v.bin"
    with ShardWriter(path, vocab_size=61, tokenizer=bytes(32), corpus=bytes(32)) as writer:
        writer.write(np.random.Generator(np.random.Philox(0)).integers(0, 61, 500))
    return TextWindows(read_shard(path, tokenizer=bytes(32), vocab_size=61), 16)


def scored(model, windows, batch_size):
    lengths = np.arange(61) % 4  # tokens of 0 to 3 bytes
    return score(
        model,
        windows,
        windows.spread(0),
        byte_lengths=lengths,
        batch_size=batch_size,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext(),
        world=World(),
    )


def test_the_loss_is_the_mean_over_every_target(tiny_model, windows):
    batch = windows.batch(windows.spread(0))
    logits = tiny_model(batch.tokens)
    expected = F.cross_entropy(logits.double().flatten(0, 1), batch.targets.flatten())
    got = scored(tiny_model, windows, 4)
    assert got.loss == pytest.approx(expected.item(), rel=1e-6)
    n_bytes = sum(int(t) % 4 for t in batch.targets.flatten())
    bits = got.loss * batch.targets.numel() / math.log(2)
    assert got.bits_per_byte == pytest.approx(bits / n_bytes, rel=1e-9)


def test_two_evaluations_agree_to_the_last_bit_and_leave_the_model_as_it_was(tiny_model, windows):
    tiny_model.train()
    random = torch.get_rng_state()
    assert scored(tiny_model, windows, 4) == scored(tiny_model, windows, 4)
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_the_batch_size_does_not_matter(tiny_model, windows):
    losses = [scored(tiny_model, windows, size).loss for size in (1, 7, 31)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
