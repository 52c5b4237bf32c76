import dataclasses
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import DataConfig, PrepareConfig, TrainConfig, UsageError, parse, to_toml
from gpt.data.batches import IGNORED, TextWindows
from gpt.data.instructions import Instructions
from gpt.data.mixture import MixedOrder, MixedWindows, prepare_mixture, quotas
from gpt.data.shards import ShardWriter, read_shard
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation.examples import ExampleEncoder
from gpt.training.loop import Trainer
from gpt.training.parallel import World
from gpt.training.setup import as_it_began, check_changes
from gpt.training.setup import settings as settings_of
from gpt.training.validation import score
from tests.tiny import tiny_run


class Sized:
    """Windows of which only the number is known."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def spread(self, n):
        return np.arange(self.n)[: n or self.n]

    def describe(self):
        return []


def mixed(sizes, weights):
    names = [f"source {n}" for n in range(len(sizes))]
    return MixedWindows(names, weights, [Sized(size) for size in sizes])


weights_and_total = st.tuples(st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
                              st.integers(0, 10**6))  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=100)
@given(weights_and_total)
def test_quotas_are_within_one_of_the_exact_parts_and_add_up(drawn):
    weights, total = drawn
    parts = quotas(weights, total)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-6


def test_the_largest_remainder_gets_what_is_left():
    assert quotas([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert quotas([1, 1, 1], 4) == [2, 1, 1]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([0.5, 1.0, 2.0, 7.0])), min_size=1, max_size=5
    ),
    st.integers(0, 2**31),
)
def test_each_epoch_has_exactly_each_sources_share_and_no_source_repeats_early(sources, seed):
    sizes, weights = (list(column) for column in zip(*sources, strict=True))
    if 0 in quotas(weights, sum(sizes)):
        return
    windows = mixed(sizes, weights)
    n = len(windows)
    order = MixedOrder(windows, batch_size=1, seed=seed)
    taken = order.at(np.arange(3 * n))
    starts = np.cumsum([0, *sizes])
    for part, (size, share) in enumerate(zip(sizes, windows.shares, strict=True)):
        is_mine = (taken >= starts[part]) & (taken < starts[part + 1])
        for epoch in range(3):
            assert is_mine[epoch * n : (epoch + 1) * n].sum() == share
        mine = taken[is_mine] - starts[part]
        for begin in range(0, len(mine) - size + 1, size):  # continued from epoch to epoch
            assert sorted(mine[begin : begin + size]) == list(range(size))
        step = 2 * n + n // 3
        expected = is_mine[:step].sum() / size
        assert order.epochs(step)[f"source {part}"] == pytest.approx(expected)


def test_every_part_of_an_epoch_has_the_mixture():
    windows = mixed([1000, 3000, 96_000], [0.5, 0.3, 0.2])
    order = MixedOrder(windows, batch_size=50, seed=0)
    starts = np.array([0, 1000, 4000])
    for step in range(0, 2000, 97):
        of = np.searchsorted(starts, order.step(step), side="right") - 1
        assert np.abs(np.bincount(of, minlength=3) - [25, 15, 10]).max() <= 2


def test_a_huge_mixture_has_its_shares_and_no_memory():
    sizes = [10**11, 3 * 10**10, 5]
    windows = mixed(sizes, [0.2, 0.8, 1e-9])
    order = MixedOrder(windows, batch_size=1000, seed=1)
    taken = order.step(10**8)
    of = np.searchsorted(np.cumsum([0, *sizes]), taken, side="right") - 1
    assert np.abs(np.bincount(of, minlength=3) - [200, 800, 0]).max() <= 2
    assert len(np.unique(taken)) == 1000


def test_a_step_of_a_mixture_depends_on_seed_and_step_alone():
    windows = mixed([10, 200], [1, 1])
    walked = MixedOrder(windows, batch_size=8, seed=5)
    for step in range(60):
        walked.step(step)
    fresh = MixedOrder(windows, batch_size=8, seed=5)
    assert np.array_equal(walked.step(33), fresh.step(33))
    assert not np.array_equal(MixedOrder(windows, batch_size=8, seed=6).step(33), fresh.step(33))


def test_a_weight_below_one_window_is_refused():
    with pytest.raises(UsageError, match=r"gives 'source 1' less than one of 20 windows"):
        mixed([10, 10], [1, 0.001])


def text_windows(path, first, n_tokens):
    with ShardWriter(path, vocab_size=10_000, tokenizer=bytes(32), corpus=bytes(32)) as writer:
        writer.write(np.arange(first, first + n_tokens))
    return TextWindows(read_shard(path, tokenizer=bytes(32), vocab_size=10_000), 4)


def test_a_batch_has_the_windows_in_their_order(tmp_path):
    parts = [text_windows(tmp_path / f"{n}.bin", 1000 * n, 41) for n in range(3)]
    windows = MixedWindows(["a", "b", "c"], [1, 1, 1], parts)
    chosen = np.array([25, 3, 12, 4, 29, 0])
    batch = windows.batch(chosen)
    expected = [1000 * (w // 10) + 4 * (w % 10) for w in chosen.tolist()]
    assert batch.tokens[:, 0].tolist() == expected
    assert batch.targets[:, -1].tolist() == [first + 4 for first in expected]


def test_validation_windows_follow_the_weights():
    chosen = mixed([100, 100], [3, 1]).spread(40)
    assert ((chosen < 100).sum(), len(chosen)) == (30, 40)
    assert len(mixed([100, 100], [3, 1]).spread(0)) == 200
    assert len(mixed([100, 100], [100, 1]).spread(4)) == 5  # at least one of each


def entry(**fields):
    return json.dumps(fields)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text("abc abd abe " * 60)
    (tmp_path / "b.jsonl").write_text('{"body": "xyz xyw "}\n' * 300)
    mixture = (
        entry(source=str(tmp_path / "a.txt"), weight=3),
        entry(source=str(tmp_path / "b.jsonl"), text_field="body", validation_fraction=0.1),
    )
    return tiny_run(
        tmp_path, DataConfig().source, data={"mixture": mixture}, model={"vocab_size": 40}
    )


def test_a_mixture_has_one_tokenizer_with_the_characters_of_all(config, tmp_path):
    data = prepare_mixture(config.data, tmp_path / "cache")
    assert data.tokenizer.characters == " abcdewxyz"
    assert data.names == ("a", "b")
    assert len(data.train) == sum(len(text.train) for text in data.texts)
    assert len(data.texts[1].validation) / len(data.texts[1].train) == pytest.approx(1 / 9, rel=0.1)


def test_each_source_gets_its_share_and_its_own_loss(config, tmp_path):
    trainer = Trainer(config, prepare_mixture(config.data, tmp_path / "cache"))
    total = trainer.source.windows
    assert [round(share / len(total), 2) for share in total.shares] == [0.75, 0.25]
    assert "a: 75.1% of the windows" in trainer.source.describe()[0]
    records = []
    trainer.reporter.evaluation = lambda record, **options: records.append(record)
    loss = trainer.evaluate(None)
    losses = records[0]["validation_losses"]
    assert loss == pytest.approx(0.75 * losses["a"] + 0.25 * losses["b"])
    part = trainer.validation.parts[1]
    options = {"byte_lengths": trainer.byte_lengths, "batch_size": 4, "device": trainer.device}
    alone = score(
        trainer.model, part, part.spread(2), autocast=trainer.autocast, world=World(), **options
    )
    assert losses["b"] == pytest.approx(alone.loss)
    progress = trainer.source.progress(5)
    assert progress["sources"]["a"]["seen"] <= 1
    assert progress["epoch"] == 5 * trainer.source.sequences / len(total)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_any_number_of_processes_sees_the_same_steps_of_a_mixture(size, config, tmp_path):
    source = Trainer(config, prepare_mixture(config.data, tmp_path / "cache")).source
    whole = source.batch(3, World()).tokens
    parts = [source.batch(3, World(rank=rank, size=size)).tokens for rank in range(size)]
    assert [row for part in parts for row in part.tolist()] == whole.tolist()


def test_a_mixture_in_toml_is_read_and_written(tmp_path):
    path = tmp_path / "mix.toml"
    path.write_text(
        '[[data.mixture]]\nsource = "a.txt"\nweight = 0.7\n'
        "[[data.mixture]]\nsource = 'b'\nname = 'other'\nseparator = '\\n'\n"
    )
    config = parse(TrainConfig, [str(path)], prog="train.py")
    parts = config.data.parts()
    assert [(part.name, part.weight) for part in parts] == [("a", 0.7), ("other", 1.0)]
    assert parts[1].data.separator == "\\n"
    assert config.run.name == "mixture"
    path.write_text(to_toml(config))
    assert parse(TrainConfig, [str(path)], prog="train.py") == config


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["{"], "must be a table with a source"),
        ([entry(weight=1)], "must be a table with a source"),
        ([entry(source="a", weight=0)], "has the weight 0, and must be above 0"),
        ([entry(source="a", weight=True)], "has the weight True"),
        ([entry(source="a", tokenizer="gpt2")], "has the setting 'tokenizer', and a source may"),
        ([entry(source="a", format="pdf")], "entry 1: data.format is 'pdf', and must be one of"),
        ([entry(source="a"), entry(source="-")], "entry 2 is a pipe"),
        ([entry(source="x/a"), entry(source="y/a")], "two sources with the name 'a'"),
        ([entry(source="a", name=3)], "has the name 3"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(entries, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(mixture=tuple(entries))


def test_a_source_beside_a_mixture_is_refused():
    with pytest.raises(UsageError, match="leave one of them out"):
        DataConfig(source="x.txt", mixture=(entry(source="a"),))
    with pytest.raises(UsageError, match=r"gpt prepare takes no data\.mixture"):
        PrepareConfig(sources=(), data=DataConfig(mixture=(entry(source="a"),)))


def test_other_weights_cannot_resume_a_run_but_moved_files_can(config, tmp_path):
    def settings_with(mixture):
        data = dataclasses.replace(config.data, mixture=mixture)
        changed = dataclasses.replace(config, data=data)
        return settings_of(changed, prepare_mixture(data, tmp_path / "cache").train)

    first, second = config.data.mixture
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "a.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    moved = entry(source=str(tmp_path / "moved" / "a.txt"), weight=3)
    heavier = first.replace('"weight": 3', '"weight": 4')
    recorded = json.loads(json.dumps(settings_with((first, second))))
    checkpoint = SimpleNamespace(progress={"settings": recorded}, model=config.model)
    assert as_it_began(config.data, checkpoint) == config.data
    again = settings_with((first, second))
    assert check_changes(tmp_path, config.model, again, checkpoint) == []
    told = check_changes(tmp_path, config.model, settings_with((moved, second)), checkpoint)
    assert [line.split()[0] for line in told] == ["data.mixture"]
    with pytest.raises(UsageError, match="the text's fingerprint was"):
        check_changes(tmp_path, config.model, settings_with((heavier, second)), checkpoint)


def test_no_held_out_window_of_a_mixture_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    mixture = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(chr(97 + i) for i in rng.integers(0, 26, 5000)))
        mixture.append(entry(source=str(path)))
    config = tiny_run(
        tmp_path, DataConfig().source, data={"mixture": tuple(mixture)}, model={"vocab_size": 40}
    )
    trainer = Trainer(config, prepare_mixture(config.data, tmp_path / "cache"))
    train, validation = (
        {hashlib.sha256(row.numpy().tobytes()).digest() for row in windows.batch(chosen).tokens}
        for windows, chosen in (
            (trainer.source.windows, trainer.source.order.at(np.arange(2000))),
            (trainer.validation, trainer.validation.spread(0)),
        )
    )
    assert len(validation) > 25
    assert not train & validation


def instructions_and_text(folder):
    records = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(60)]
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "book.txt").write_text("the cat sat on the mat.\n" * 60)
    sources = [{"source": str(path)}, {"source": str(folder / "book.txt"), "weight": 0.5}]
    return DataConfig(mixture=tuple(map(json.dumps, sources)))


def test_instructions_are_mixed_with_text(tmp_path):
    config = instructions_and_text(tmp_path)
    data = prepare_mixture(
        config, tmp_path / "cache", tokenizer=ByteTokenizer(), encoder=ExampleEncoder
    )
    assert [isinstance(text, Instructions) for text in data.texts] == [True, False]
    windows = data.windows("train", 16)
    sums, book = windows.parts
    batch = windows.batch(np.array([len(sums) + 1, 0]))
    text, examples = book.batch(np.array([1])), sums.batch(np.array([0]))
    assert torch.equal(batch.tokens, torch.cat([text.tokens, examples.tokens]))
    assert torch.equal(batch.targets, torch.cat([text.targets, examples.targets]))
    assert torch.equal(batch.documents[1:], examples.documents)
    assert not batch.documents[0].any()
    assert (batch.targets[1] == IGNORED).any()


def test_a_mixture_with_instructions_needs_a_models_tokenizer(tmp_path):
    with pytest.raises(
        UsageError, match=r"data.mixture has instructions \('sums'\), and needs init"
    ):
        prepare_mixture(instructions_and_text(tmp_path), tmp_path, encoder=ExampleEncoder)
