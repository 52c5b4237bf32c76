"""``gpt prepare``: the same files whatever the workers and however often it was killed."""

import dataclasses
import json
import random

import numpy as np
import pytest

from gpt.config import DataConfig, PrepareConfig, UsageError
from gpt.data import encoding, formats, local_pipeline
from gpt.data.corpus import open_corpus
from gpt.data.journal import Journal
from gpt.data.mixture import prepare_mixture
from gpt.data.pieces import Place, at_end, by_content, pieces
from gpt.data.preparation import prepare_corpus
from gpt.data.prepare import prepare
from gpt.data.prepared import read_corpus
from gpt.data.shards import ShardWriter
from gpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer, decode
from gpt.training.run import check_source

END = 256


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(local_pipeline, "BLOCKS_A_STEP", 2)


def texts_of(n, seed=0):
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(50)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 120))) for _ in range(n)]


@pytest.fixture
def source(tmp_path):
    """Two files of records, one of which has long documents and repetitions."""
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = texts_of(150)
    for name, some in {"a": texts[:90], "b": [*texts[90:], *texts[:20]]}.items():
        lines = [json.dumps({"text": text}) + "\n" for text in some]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def config_of(source, out, **fields):
    return PrepareConfig(
        **{
            "sources": (str(source),),
            "out": out,
            "data": DataConfig(tokenizer="byte", validation_fraction=0.2),
            "shard_tokens": 3000,
            **fields,
        }
    )


def prepared(config, **options):
    return prepare_corpus(config, lambda corpus: ByteTokenizer(), **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(shards):
    ids = shards.read(0, len(shards)).tolist()
    text = decode(ByteTokenizer(), [ord("\n") if i == END else i for i in ids])
    return text.split("\n")[:-1]


@pytest.mark.parametrize("duplicates", ["keep", "exact"])
@pytest.mark.parametrize("validation", ["documents", "end"])
def test_the_files_do_not_depend_on_the_workers(validation, duplicates, source, tmp_path):
    made = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        prepared(
            config_of(source, out, workers=workers, validation=validation, duplicates=duplicates)
        )
        made.append(files(out))
    assert made[0] == made[1] == made[2]
    assert max(made[0]).startswith("validation-")
    assert len(made[0]) > 6


def test_all_documents_are_there_in_order_and_each_is_on_one_side(source, tmp_path):
    summary = prepared(config_of(source, tmp_path / "out"))
    data = read_corpus(tmp_path / "out")
    train, validation = documents(data.train), documents(data.validation)
    given = [
        json.loads(line)["text"]
        for name in "ab"
        for line in (source / f"{name}.jsonl").read_text().splitlines()
    ]
    assert sorted(train + validation) == sorted(given)
    assert [text for text in given if text in set(train)] == train
    assert not set(train) & set(validation)
    assert summary["counts"]["documents"] == len(given) == 170
    assert summary["counts"]["tokens"] == sum(len(text) + 1 for text in given)


def test_held_out_documents_stay_held_out_when_the_corpus_grows(source, tmp_path):
    prepared(config_of(source, tmp_path / "one"))
    more = [json.dumps({"text": text}) + "\n" for text in texts_of(100, seed=5)]
    (source / "0.jsonl").write_text("".join(more))
    prepared(config_of(source, tmp_path / "two"))
    one, two = (documents(read_corpus(tmp_path / n).validation) for n in ("one", "two"))
    assert set(one) < set(two)


def test_no_window_of_the_held_out_documents_is_in_training(source, tmp_path):
    prepared(config_of(source, tmp_path / "out", duplicates="exact"))
    data = read_corpus(tmp_path / "out")
    windows = [
        {data_part.read(start, 40).tobytes() for start in range(len(data_part) - 40)}
        for data_part in (data.train, data.validation)
    ]
    assert not windows[0] & windows[1]


class Killed(BaseException):
    """As good as SIGKILL for what is on the disk."""


@pytest.mark.parametrize("duplicates", ["keep", "exact"])
@pytest.mark.parametrize("validation", ["documents", "end"])
@pytest.mark.parametrize("after", [1, 20, 35])
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    after, validation, duplicates, source, tmp_path, monkeypatch
):
    kinds = {"validation": validation, "duplicates": duplicates}
    prepared(config_of(source, tmp_path / "whole", **kinds))
    config = config_of(source, tmp_path / "killed", workers=1, **kinds)
    writes, write = [0], ShardWriter.write

    def count(self, ids):
        writes[0] += 1
        if writes[0] == after:
            write(self, ids[: len(ids) // 2])
            raise Killed
        write(self, ids)

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", count)
        for _ in range(3):  # each goes on from where the one before was
            writes[0] = 0
            with pytest.raises(Killed):
                prepared(config, say=said.append)
    if after > 1:
        assert said
        assert said[-1].startswith("going on after ")
    prepared(config)
    killed, whole = files(tmp_path / "killed"), files(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    for name, content in whole.items():
        assert killed[name] == content, name


@pytest.mark.slow
def test_a_preparation_that_is_killed_50_times_has_the_same_bytes(source, tmp_path, monkeypatch):
    draw = random.Random(1)
    for duplicates in ("keep", "exact"):
        whole, out = tmp_path / f"whole {duplicates}", tmp_path / f"killed {duplicates}"
        prepared(config_of(source, whole, duplicates=duplicates))
        config, write = config_of(source, out, duplicates=duplicates), ShardWriter.write
        for _ in range(50):
            left = [draw.randint(1, 60)]

            def count(self, ids, left=left, write=write):
                left[0] -= 1
                if not left[0]:
                    write(self, ids[: draw.randint(0, len(ids))])
                    raise Killed
                write(self, ids)

            with monkeypatch.context() as patch:
                patch.setattr(ShardWriter, "write", count)
                try:
                    prepared(config)
                except Killed:
                    continue
                break
        prepared(config)
        assert files(out) == files(whole)


@pytest.mark.parametrize("step", [1, 3])
def test_what_was_flushed_before_a_line_of_the_journal_that_is_missing_is_done_again(
    step, source, tmp_path, monkeypatch
):
    prepared(config_of(source, tmp_path / "whole", duplicates="exact"))
    config, write = config_of(source, tmp_path / "killed", duplicates="exact"), Journal.write

    def killed(self, line):
        if line.get("step") == step:
            raise Killed
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", killed)
        with pytest.raises(Killed):
            prepared(config)
    prepared(config)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_line_of_the_journal_that_is_not_whole_does_not_count(damage, tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}) as journal:
        journal.write({"step": 1})
        journal.write({"step": 2})
    raw = path.read_bytes()
    changed = {"cut": raw[:-3], "flipped": raw[:-3] + b"x" + raw[-2:], "empty": b""}[damage]
    path.write_bytes(changed)
    for _ in range(2):  # opening it loses nothing
        with Journal(path, {"a": 1}) as journal:
            assert journal.last == (None if damage == "empty" else {"step": 1})


@pytest.mark.parametrize("left", ["journal.jsonl", "duplicates.sqlite", ".journal.jsonl.new"])
def test_what_a_kill_at_the_end_left_is_deleted(left, source, tmp_path):
    out = tmp_path / "out"
    prepared(config_of(source, out))
    before = files(out)
    (out / left).write_text("x")
    prepared(config_of(source, out))
    assert files(out) == before


def test_a_preparation_that_was_killed_in_its_first_line_goes_on(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(self, step):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", killed)
        with pytest.raises(Killed):
            prepared(config_of(source, out))
    assert prepared(config_of(source, out))["counts"]["documents"] == 170


def test_a_pipe_with_the_same_text_continues_a_preparation(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("abcdefghij " * 500)
    said = []

    def prepare_pipe():
        with (tmp_path / "text.txt").open() as file:
            config = config_of(f"/dev/fd/{file.fileno()}", tmp_path / "out")
            return prepared(config, say=said.append)

    with monkeypatch.context() as patch:
        patch.setattr(local_pipeline.ShardSeries, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_pipe()
    prepare_pipe()
    prepare_pipe()
    assert [text.partition(" after ")[0] for text in said] == [
        "going on",
        f"{tmp_path / 'out'} is prepared already",
    ]
    assert not (tmp_path / "out" / ".piped").exists()


def test_the_tokenizer_of_a_preparation_is_made_once(source, tmp_path, monkeypatch):
    config = config_of(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(local_pipeline.ShardSeries, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(config)
    assert prepare_corpus(config, lambda corpus: 1 / 0)["kind"] == "byte"


def test_another_work_is_not_continued(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(local_pipeline.ShardSeries, "close", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(config_of(source, out))
    with pytest.raises(UsageError, match=r"unfinished preparation of other .* \(shard_tokens\)"):
        prepared(config_of(source, out, shard_tokens=2999))


def test_a_shard_that_became_shorter_is_not_continued(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(local_pipeline.ShardSeries, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(config_of(source, out, shard_tokens=10**6))
    (out / "train-00000.bin").write_bytes(bytes(1000))
    with pytest.raises(UsageError, match=r"train-00000\.bin has fewer ids than it had"):
        prepared(config_of(source, out, shard_tokens=10**6))


@pytest.mark.parametrize("content", ["[]", "{}", '{"work": {}, "counts": {}, "shards": {}}'])
def test_a_damaged_list_of_shards_is_not_taken_for_a_finished_folder(content, source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    (tmp_path / "out" / "corpus.json").write_text(content)
    with pytest.raises(UsageError, match=r"corpus\.json is not what gpt prepare wrote"):
        prepared(config_of(source, tmp_path / "out"))


def test_a_finished_folder_is_kept_and_never_mixed(source, tmp_path):
    out, said = tmp_path / "out", []
    prepared(config_of(source, out))
    before = files(out)
    prepared(config_of(source, out), say=said.append)
    assert said == [f"{out} is prepared already"]
    with pytest.raises(UsageError, match="has other prepared data; name a new folder"):
        prepared(config_of(source, out, duplicates="exact"))
    assert files(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"has other files \(thesis\.txt\); name a new folder"):
        prepared(config_of(source, tmp_path / "mine"))


def test_a_folder_of_few_documents_is_held_out_at_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij " * 100)
    prepared(config_of(tmp_path / "a.txt", tmp_path / "out"))
    data = read_corpus(tmp_path / "out")
    assert len(data.train) == 880
    assert len(data.validation) == 221


@pytest.mark.parametrize("splitter", [by_content(0.5), at_end(4000)])
def test_reading_goes_on_from_any_place(splitter, source):
    corpus = open_corpus(str(source))
    whole = list(pieces(corpus, splitter, start=Place()))
    for number in range(0, len(whole), 17):
        if (place := whole[number].after) is not None:
            rest = list(pieces(corpus, splitter, start=place))
            assert rest == whole[number + 1 :]


def test_a_run_trains_on_a_prepared_folder_in_place(source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    said = []
    config = DataConfig(source=str(tmp_path / "out"), validation_fraction=0.5)
    data = prepare(config, tmp_path / "cache", say=said.append)
    assert data.tokenizer.kind == "byte"
    assert "is prepared: it has its own tokenizer and validation" in said[0]
    assert not (tmp_path / "cache").exists()
    windows = data.windows("train", 64)
    ids = data.train.read(0, len(data.train))
    batch = windows.batch(np.arange(len(windows)))
    assert batch.tokens.flatten().tolist() == ids[: batch.tokens.numel()].tolist()
    assert batch.targets[:, -1].tolist() == ids[64 : batch.tokens.numel() + 1 : 64].tolist()
    assert len(data.train.parts) > 2


def test_shards_find_the_ends_of_documents(source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    data = read_corpus(tmp_path / "out")
    ids = data.train.read(0, len(data.train))
    assert data.train.documents(END).tolist() == np.flatnonzero(ids == END).tolist()


def summary_with(part):
    """A ``corpus.json`` with one shard."""
    counts = {"documents": 1, "bytes": 1, "tokens": 1}
    shards = {"train": [part], "validation": []}
    return json.dumps({"work": {}, "counts": counts, "shards": shards})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.json", "[]", "is not what gpt prepare wrote"),
        ("corpus.json", "{", "is not JSON"),
        (
            "corpus.json",
            summary_with({"name": "../a.bin", "tokens": 1}),
            r"names the shard '\.\./a",
        ),
        ("corpus.json", summary_with(4), "is not what gpt prepare wrote"),
        ("corpus.json", summary_with({"name": "a.bin"}), "is not what gpt prepare wrote"),
        ("train-00001.bin", None, "train-00001.bin"),
        ("train-00001.bin", "GPT", "is not a token shard"),
    ],
)
def test_a_damaged_folder_is_one_sentence(name, content, message, source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    path = tmp_path / "out" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UsageError, match=message):
        prepare(DataConfig(source=str(tmp_path / "out")), tmp_path / "cache")


def test_another_tokenizer_than_the_models_is_refused(source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    other = dataclasses.replace(DataConfig(), source=str(tmp_path / "out"))
    from gpt.data.tokenizer import CharTokenizer

    with pytest.raises(UsageError, match="prepared with another tokenizer than the model's"):
        prepare(other, tmp_path / "cache", tokenizer=CharTokenizer("ab"))


def test_several_sources_become_one_corpus(source, tmp_path):
    (tmp_path / "c.txt").write_text("The last one.")
    sources = (str(source / "a.jsonl"), str(tmp_path / "c.txt"), str(source / "a.jsonl"))
    summary = prepared(config_of(source, tmp_path / "out", sources=sources))
    assert summary["counts"]["documents"] == 91
    with pytest.raises(UsageError, match=r"a source is 'nowhere', which is not a file"):
        prepared(config_of(source, tmp_path / "other", sources=("nowhere",)))


def test_a_pipe_can_be_prepared(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("abcdefghij " * 100)
    with (tmp_path / "text.txt").open() as file:
        source = f"/dev/fd/{file.fileno()}"
        summary = prepared(config_of(source, tmp_path / "out"))
    assert summary["counts"]["characters"] == 1100
    assert len(read_corpus(tmp_path / "out").train) == 880


@pytest.mark.slow  # starts a cluster
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_ray_writes_the_ids_that_one_machine_writes(source, tmp_path, monkeypatch):
    monkeypatch.undo()  # the workers have pieces of the usual length
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data]'")
    kinds = {"validation": "documents", "shard_tokens": 1500}
    local = prepared(config_of(source, tmp_path / "local", **kinds))
    on_ray = prepared(config_of(source, tmp_path / "ray", engine="ray", **kinds))
    assert on_ray["counts"] == local["counts"]
    one, other = (read_corpus(tmp_path / name) for name in ("local", "ray"))
    for split in ("train", "validation"):
        ids = [getattr(data, split).read(0, 10**6).tolist() for data in (one, other)]
        assert ids[0] == ids[1]
    assert not (tmp_path / "ray" / ".parts").exists()
    ray.init(log_to_driver=False, include_dashboard=False)
    whole = files(tmp_path / "ray")
    (tmp_path / "ray").rename(tmp_path / "old")
    with monkeypatch.context() as patch:
        patch.setattr("gpt.data.preparation.summary_of", lambda *parts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(config_of(source, tmp_path / "ray", engine="ray", **kinds))
    with pytest.raises(UsageError, match=r"unfinished preparation of other .* \(engine\)"):
        prepared(config_of(source, tmp_path / "ray", **kinds))
    prepared(config_of(source, tmp_path / "ray", engine="ray", **kinds))
    assert files(tmp_path / "ray") == whole
    ray.shutdown()
    (source / "b.jsonl").write_text('{"text": 4}\n')
    with pytest.raises(UsageError, match=r"b\.jsonl line 1 has 4 as its 'text', not a string"):
        prepared(config_of(source, tmp_path / "broken", engine="ray", **kinds))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"duplicates": "exact"}, "duplicates is exact, and the workers of engine ray"),
        ({"validation": "end"}, "validation is end, and the workers of engine ray"),
    ],
)
def test_what_workers_cannot_know_is_refused(fields, message, source, tmp_path):
    with pytest.raises(UsageError, match=message):
        prepared(config_of(source, tmp_path / "out", engine="ray", **fields))


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"a\.txt' has no text"):
        prepared(config_of(tmp_path / "a.txt", tmp_path / "out"))


def test_a_damaged_id_of_a_prepared_folder_is_noticed(source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    path = tmp_path / "out" / "train-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[400] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"train-00001\.bin is damaged"):
        read_corpus(tmp_path / "out")


RELEASED = GPT2Tokenizer.released()


def test_a_tokenizer_of_a_thread_has_the_same_ids():
    own = RELEASED.for_thread()
    assert own._encoding() is not RELEASED._encoding()
    assert own._encoding()._core_bpe is not RELEASED._encoding()._core_bpe
    for text in ("Speak, speak.\n\n You  are", "中文 é 1234 <|endoftext|>", ""):
        assert own.encode(text).tolist() == RELEASED.encode(text).tolist()


def test_other_contents_of_the_same_size_are_noticed(source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    path = source / "a.jsonl"
    path.write_text(path.read_text().replace("w1", "v1"))
    with pytest.raises(UsageError, match="has other prepared data"):
        prepared(config_of(source, tmp_path / "out"))


def test_a_folder_inside_the_source_is_refused(source):
    with pytest.raises(UsageError, match=r"out is .*, which is inside the source .*; name a fol"):
        prepared(config_of(source, source / "out"))


def test_prepared_folders_can_be_parts_of_a_mixture(source, tmp_path):
    prepared(config_of(source, tmp_path / "out"))
    mixture = tuple(json.dumps({"source": str(tmp_path / name)}) for name in ("out", "b.txt"))
    (tmp_path / "b.txt").write_text("another text " * 30)
    check_source(DataConfig(mixture=mixture), tmp_path / "run")
    data = prepare_mixture(DataConfig(mixture=mixture), tmp_path / "cache")
    assert data.tokenizer.kind == "byte"


def test_a_journal_that_cannot_be_reopened_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}) as journal:
        journal.write({"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UsageError, match="No space left"):
            Journal(path, {"a": 1})
    with Journal(path, {"a": 1}) as journal:
        assert journal.last == {"step": 1}


def test_a_corpus_without_documents_for_validation_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(UsageError, match="no document is for (train|validation), with validation"):
        prepared(config_of(tmp_path / "a.txt", tmp_path / "out", validation="documents"))
