from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt.config import UsageError
from gpt.data.batches import IGNORED, Boundary, TextWindows
from gpt.data.document_windows import DocumentWindows
from gpt.data.prepare import prepare
from gpt.data.shards import ShardWriter, read_shard
from gpt.training.setup import check_changes
from gpt.training.setup import settings as settings_of
from gpt.training.source import ShuffledWindows
from tests.tiny import tiny_run

END = 9
BEGINS, ENDS = Boundary(END, begins=True), Boundary(END, begins=False)


def shard_of(folder, ids):
    path = folder / "train.bin"
    with ShardWriter(path, vocab_size=100, tokenizer=bytes(32), corpus=bytes(32)) as writer:
        writer.write(np.array(ids))
    return read_shard(path, tokenizer=bytes(32), vocab_size=100)


#           0  1  2  3    4  5    6  7  8  9
STREAM = [1, 2, 3, END, 4, END, 5, 6, 7, END, 8, 8, 8, 8, 8, END, 1]


def pieces_of(batch):
    """Each document of a batch as (tokens, targets that count)."""
    found = []
    for tokens, targets, documents in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist(), strict=True
    ):
        rows = list(zip(documents, tokens, targets, strict=True))
        for number in dict.fromkeys(documents):
            some = [(token, target) for each, token, target in rows if each == number]
            found.append(([t for t, _ in some], [y for _, y in some if y != IGNORED]))
    return found


def test_packed_windows_keep_documents_apart(tmp_path):
    windows = TextWindows(shard_of(tmp_path, STREAM), 8, boundary=BEGINS)
    batch = windows.batch(np.array([0, 1]))
    assert batch.tokens.flatten().tolist() == STREAM[:16]
    assert batch.targets.flatten().tolist() == STREAM[1:17]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]]


def test_end_of_text_stays_with_its_document_if_documents_begin_by_themselves(tmp_path):
    windows = TextWindows(shard_of(tmp_path, STREAM), 8, boundary=ENDS)
    batch = windows.batch(np.array([0]))
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]
    assert batch.targets.tolist() == [[2, 3, END, IGNORED, END, IGNORED, 6, 7]]


@pytest.mark.parametrize("boundary", [BEGINS, ENDS])
def test_best_fit_keeps_documents_whole_and_cuts_only_long_ones(boundary, tmp_path):
    windows = DocumentWindows(shard_of(tmp_path, STREAM), 5, boundary)
    found = pieces_of(windows.batch(windows.spread(0)))
    pieces = [(tokens[: len(targets)], targets) for tokens, targets in found if targets]
    whole = {
        BEGINS: [[1, 2, 3, END], [END, 4, END], [END, 5, 6, 7, END], [END, 8, 8, 8, 8, 8, END],
                 [END, 1]],
        ENDS: [[1, 2, 3, END], [4, END], [5, 6, 7, END], [8, 8, 8, 8, 8, END]],
    }[boundary]  # fmt: skip
    expected = []
    for document in whole:
        tokens, targets = document[:-1], document[1:]
        for at in range(0, len(tokens), 5):
            expected.append((tokens[at : at + 5], targets[at : at + 5]))
    assert sorted(pieces) == sorted(expected)
    assert windows.n_cut == sum(len(document) - 1 > 5 for document in whole)
    assert windows.n_documents == len(whole)
    used = sum(len(targets) for _, targets in pieces)
    assert windows.fill == used / (5 * len(windows))
    assert f"{windows.n_cut} are longer" in windows.describe()[0]


def test_no_target_is_lost_by_best_fit(tmp_path):
    rng = np.random.default_rng(1)
    ids = np.where(rng.random(5000) < 0.05, END, rng.integers(10, 100, 5000))
    windows = DocumentWindows(shard_of(tmp_path, ids), 64, BEGINS)
    targets = windows.batch(windows.spread(0)).targets
    counted = targets[targets != IGNORED]
    assert sorted(counted.tolist()) == sorted(ids[1:].tolist())


def test_a_text_without_a_document_for_best_fit_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no document of two tokens"):
        DocumentWindows(shard_of(tmp_path, [3]), 5, ENDS)


@pytest.mark.parametrize("kind", ["crossing", "packed", "best_fit"])
def test_a_run_trains_on_each_kind_of_windows(kind, tmp_path):
    from gpt.training.loop import Trainer

    source = tmp_path / "lines.txt"
    source.write_text("".join(f"line {n} of {n * n}\n" for n in range(300)))
    data = {"separator": "\\n", "windows": kind}
    config = tiny_run(tmp_path, source, data=data, model={"vocab_size": 40})
    trainer = Trainer(config, prepare(config.data, tmp_path / "cache"))
    loss = trainer.update().loss
    batch = trainer.source.batch(0, trainer.world)
    assert (batch.documents is None) == (kind == "crossing")
    assert np.isfinite(loss)
    assert np.isfinite(trainer.evaluate(None))
    fixed = settings_of(config, trainer.data.train)
    assert fixed["data.windows"] == kind


def test_a_run_of_an_older_version_cannot_resume_with_other_windows(tmp_path):
    config = tiny_run(tmp_path, "book.txt")
    checkpoint = SimpleNamespace(progress={"settings": {}}, model=config.model)
    assert check_changes(tmp_path, config.model, {"data.windows": "crossing"}, checkpoint) == []
    with pytest.raises(UsageError, match=r"data\.windows was crossing and is packed"):
        check_changes(tmp_path, config.model, {"data.windows": "packed"}, checkpoint)


def test_the_log_tells_the_epoch_and_how_much_was_seen(tmp_path):
    windows = TextWindows(shard_of(tmp_path, STREAM), 2)  # 8 of them
    source = ShuffledWindows(windows, sequences=3, seed=0)
    assert source.progress(1) == {"epoch": 3 / 8, "seen": 3 / 8}
    assert source.progress(4) == {"epoch": 1.5, "seen": 1.0}


def test_a_split_batch_keeps_its_documents(tmp_path):
    batch = TextWindows(shard_of(tmp_path, STREAM), 8, boundary=BEGINS).batch(np.array([0, 1]))
    parts = list(batch.split(1))
    assert torch.equal(torch.cat([part.documents for part in parts]), batch.documents)
    assert torch.equal(batch.to(torch.device("cpu")).documents, batch.documents)
