import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.checkpoint import State
from gpt.config import ModelConfig, UsageError
from tests.conftest import make_model

COMMITTED = Path(__file__).parent / "checkpoints"


def save(run, step, model, *, training=None, progress=None, metrics=None):
    state = State(
        step=step,
        model=model.config,
        weights=dict(model.named_parameters()),
        training=training or {"embed.weight/exp_avg": torch.ones(2)},
        progress=progress or {},
        metrics=metrics or {},
    )
    return checkpoints.save(run, state)


@pytest.fixture
def run(tmp_path, tiny_model):
    for step in (10, 20, 30):
        path = save(tmp_path, step, tiny_model)
        checkpoints.point(tmp_path, "last", path.name)
        if step == 20:
            checkpoints.point(tmp_path, "best", path.name)
    return tmp_path


def folder(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_equals_the_saved_state(tied, tiny_config, tmp_path):
    model = make_model(dataclasses.replace(tiny_config, tie_embeddings=tied, n_kv_head=2))
    training = {"norm.bias/exp_avg": torch.arange(3), "norm.bias/step": torch.tensor(4.0)}
    progress = {"nested": [{"x": 0.1, "y": None}]}
    path = save(tmp_path, 7, model, training=training, progress=progress, metrics={"loss": 2.0})
    found = checkpoints.verify(path)
    assert (found.step, found.metrics, found.model) == (7, {"loss": 2.0}, model.config)
    loaded = checkpoints.load_model(found)
    tokens = torch.randint(61, (2, 9))
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.head.weight is loaded.embed.weight) == tied
    assert not loaded.training
    assert found.progress == progress
    learned = tensors.load(found.path / "training")
    assert learned.keys() == training.keys()
    assert all(torch.equal(learned[name], training[name]) for name in training)


@pytest.mark.parametrize("odd", range(0, 64, 8))
def test_tensors_are_loaded_to_aligned_addresses(odd, tmp_path):
    saved = {"a": torch.ones(3), "b": torch.ones(5)}
    tensors.write(tmp_path / "some", saved, metadata={"pad": "x" * odd})
    assert all(tensors.is_aligned(t) for t in tensors.load(tmp_path / "some").values())


def test_weights_are_loaded_in_the_given_dtype(run, tiny_model):
    found = checkpoints.find(run)
    loaded = checkpoints.load_model(found, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, tiny_model.get_parameter(name).bfloat16())


def test_a_run_has_its_best_and_its_last_checkpoint(run):
    assert checkpoints.find(run, "best").step == 20
    assert checkpoints.find(run, "last").step == 30
    assert checkpoints.find(folder(run, 10)).step == 10


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoints.find(tmp_path) is None


def damage(path, how):
    match how:
        case "flipped bit":
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-2])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "empty", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_reported_and_the_newest_valid_one_used(file, how, run):
    damage(folder(run, 30) / file, how)
    said = []
    assert checkpoints.find(run, "last", say=said.append).step == 20
    assert "step-00000030" in said[0]
    assert said[-1].endswith("last names step-00000030, and the newest valid one is step-00000020")


def test_a_run_with_no_valid_checkpoint_is_refused(run):
    for step in (10, 20, 30):
        damage(folder(run, step) / "model.safetensors", "truncated")
    with pytest.raises(UsageError, match="has no valid checkpoint: .* is damaged"):
        checkpoints.find(run)


def test_a_damaged_checkpoint_that_is_named_directly_is_refused(run):
    damage(folder(run, 20) / "model.safetensors", "flipped bit")
    with pytest.raises(UsageError, match=r"step-00000020 is damaged: model\.safetensors"):
        checkpoints.find(folder(run, 20))


def test_a_killed_save_is_no_checkpoint(run, tiny_model, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for module, name in ((tensors, "save_file"), (checkpoints, "_sha256"), (checkpoints, "flush")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                save(run, 40, tiny_model)
        assert not folder(run, 40).exists()
        assert checkpoints.find(run, "last").step == 30


def test_a_checkpoint_is_flushed_to_disk_before_it_has_its_name(tmp_path, tiny_model, monkeypatch):
    flushed = []
    flush = checkpoints.flush

    def record(path):
        flushed.append((path.name, folder(tmp_path, 1).exists()))
        flush(path)

    monkeypatch.setattr(checkpoints, "flush", record)
    save(tmp_path, 1, tiny_model)
    before = {name for name, named in flushed if not named}
    assert {"model.safetensors", "training.safetensors", "meta.json"} < before
    assert any(name.startswith(".step-00000001-") for name in before)
    assert flushed[-1] == ("checkpoints", True)


def test_a_leftover_temporary_folder_is_no_checkpoint(run):
    shutil.copytree(folder(run, 30), run / "checkpoints" / ".step-00000040-abc")
    (run / "last").write_text("step-00000040\n")
    assert checkpoints.find(run, "last").step == 30


def test_saving_creates_the_runs_folder(tmp_path, tiny_model):
    path = save(tmp_path / "a" / "run", 3, tiny_model)
    assert checkpoints.find(tmp_path / "a" / "run").path == path


def test_saving_a_step_again_replaces_it(run, tiny_config):
    other = make_model(tiny_config, seed=9)
    save(run, 30, other)
    loaded = checkpoints.load_model(checkpoints.find(run, "last"))
    assert torch.equal(loaded.embed.weight, other.embed.weight)
    assert {p.name for p in folder(run, 30).iterdir()} == {
        "model.safetensors",
        "training.safetensors",
        "meta.json",
    }


def test_pruning_keeps_the_newest_and_the_best(run, tiny_model):
    for step in (40, 50):
        path = save(run, step, tiny_model)
        checkpoints.point(run, "last", path.name)
    (run / "checkpoints" / ".step-00000035-left").mkdir()
    checkpoints.prune(run, keep=2)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["step-00000020", "step-00000040", "step-00000050"]


def test_pruning_keeps_the_configured_multiples(run, tiny_model):
    for step in (40, 45, 50):
        checkpoints.point(run, "last", save(run, step, tiny_model).name)
    assert checkpoints.prune(run, keep=1, keep_every=20) == []
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["step-00000020", "step-00000040", "step-00000050"]
    checkpoints.prune(run, keep=1, keep_every=0)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000020", "step-00000050"}


@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_sharded_checkpoint_has_what_was_saved(group, tiny_model, tmp_path):
    weights = dict(tiny_model.named_parameters())
    training = {"norm.bias/exp_avg": torch.arange(3)}
    state = State(
        step=7, model=tiny_model.config, weights=weights, training=training, progress={}, metrics={}
    )
    path = checkpoints.save_sharded(tmp_path, state, group)
    assert path == folder(tmp_path, 7)
    assert sorted(p.name for p in path.iterdir()) == ["meta.json", "model", "training"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = checkpoints.verify(path)
    loaded = checkpoints.load_model(found)
    assert all(torch.equal(loaded.get_parameter(name), w) for name, w in weights.items())
    assert torch.equal(tensors.load(path / "training")["norm.bias/exp_avg"], torch.arange(3))
    shard = next((path / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match="is damaged"):
        checkpoints.verify(path)


def test_a_shard_that_cannot_be_written_is_an_os_error(group, tiny_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(tensors, "write_shards", full)
    state = State(step=7, model=tiny_model.config, weights={}, training={}, progress={}, metrics={})
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save_sharded(tmp_path, state, group)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_later_format_is_refused(run):
    meta = folder(run, 30) / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 3}))
    with pytest.raises(UsageError, match="has format 3, and this program reads 1 to 2"):
        checkpoints.verify(folder(run, 30))


def test_weights_that_do_not_fit_the_configuration_are_refused(run):
    found = checkpoints.find(run)
    other = dataclasses.replace(found, model=dataclasses.replace(found.model, n_layer=3))
    with pytest.raises(UsageError, match=r"does not fit its configuration: blocks\.2\."):
        checkpoints.load_model(other)
    other = dataclasses.replace(found, model=dataclasses.replace(found.model, n_embd=64))
    with pytest.raises(UsageError, match=r"does not fit its configuration: .*embed\.weight"):
        checkpoints.load_model(other)


def test_a_training_file_that_would_run_code_is_not_run(run):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (run / "executed",))

    found = checkpoints.find(run)
    torch.save({"x": Evil()}, found.path / "training.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load_format_1(found)
    assert not (run / "executed").exists()


@pytest.mark.parametrize("path", sorted(COMMITTED.iterdir()), ids=lambda p: p.name)
def test_a_checkpoint_of_every_format_so_far_still_loads(path):
    import gpt

    expected = json.loads((path / "expected.json").read_text())
    loaded = gpt.load(path)
    ids = loaded.tokenizer.encode(expected["prompt"]).tolist()
    logits = loaded.model(torch.tensor([ids]))[0, -1]
    assert logits[:5].tolist() == pytest.approx(expected["logits"], abs=1e-5)
    [got] = gpt.generate(loaded, expected["prompt"], temperature=0, max_new_tokens=12)
    assert got.text == expected["text"]


def test_model_configurations_survive_the_meta_file():
    config = ModelConfig(n_kv_head=3, dropout=0.1, bias=False, tie_embeddings=False)
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "meta.json"])
def test_every_flipped_bit_and_every_cut_is_detected(file, run):
    path = folder(run, 30) / file
    whole = path.read_bytes()
    chance = random.Random(0)
    meta = json.loads((folder(run, 30) / "meta.json").read_text())
    for _ in range(150):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
        try:
            found = checkpoints.verify(folder(run, 30))
        except UsageError:
            continue
        assert file == "meta.json"  # only its white space changed
        assert found.step == 30
        assert json.loads(raw) == meta
    for _ in range(20):
        path.write_bytes(whole[: chance.randrange(len(whole) - 1)])
        assert checkpoints.find(run, "last").step == 20


@pytest.mark.parametrize("pointer", ["best", "last"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"step-00000099\n", b"../../x"])
def test_a_broken_pointer_leads_to_the_newest_valid_one(content, pointer, run):
    (run / pointer).write_bytes(content)
    said = []
    assert checkpoints.find(run, pointer, say=said.append).step == 30
    assert "and the newest valid one is step-00000030" in said[-1]


def test_last_is_the_newest_even_if_the_pointer_is_older(run):
    (run / "last").write_text("step-00000010\n")
    said = []
    assert checkpoints.find(run, "last", say=said.append).step == 30
    assert said == []


def test_a_checkpoint_is_renamed_before_it_is_deleted(run, monkeypatch):
    def killed(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(run, keep=1)
    monkeypatch.undo()
    assert not folder(run, 10).exists()
    checkpoints.prune(run, keep=1)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000030",
    ]


def test_a_full_disk_is_an_os_error_with_its_number(tmp_path, tiny_model):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save(tmp_path, 1, tiny_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_tensors_are_filled_by_name_and_the_others_are_not_read(tmp_path):
    there = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.int64)}
    tensors.write(tmp_path / "x", there)
    into = {"b": torch.zeros(2, 3, dtype=torch.int64)}
    tensors.read(tmp_path / "x", into)
    assert torch.equal(into["b"], there["b"])
    described = tensors.describe(tmp_path / "x")
    assert {n: (t.shape, t.dtype, t.device.type) for n, t in described.items()} == {
        "a": ((4,), torch.float32, "meta"),
        "b": ((2, 3), torch.int64, "meta"),
    }
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="x.safetensors cannot be read"):
        tensors.load(tmp_path / "x")


def test_an_unreadable_checkpoint_that_may_be_valid_is_not_passed_over(run, monkeypatch):
    newest = folder(run, 30) / "meta.json"
    whole = newest.read_text()
    newest.write_text(json.dumps(json.loads(whole) | {"format": 3}))
    for name in ("best", "last"):
        (run / name).write_text("step-00000030\n")
        with pytest.raises(UsageError, match="has format 3"):
            checkpoints.find(run, name)
    newest.write_text(whole)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(checkpoints, "_sha256", stale)
    with pytest.raises(
        UsageError, match=r"step-00000030 cannot be read: Stale file handle \(.*30/"
    ):
        checkpoints.find(run, "last")


def test_damaged_checkpoints_of_the_same_name_are_all_kept(run):
    for content in (b"first", b"second"):
        (folder(run, 30) / "model.safetensors").write_bytes(content)
        [place] = checkpoints.set_aside(run, newer_than=20)
        assert (place / "model.safetensors").read_bytes() == content
        shutil.copytree(place, folder(run, 30))
    assert len(list((run / "checkpoints").glob("damaged-*"))) == 2


def test_an_old_checkpoint_that_cannot_be_deleted_is_only_reported(run, monkeypatch):
    def busy(path):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoints, "_delete", busy)
    [problem] = checkpoints.prune(run, keep=1)
    assert problem.startswith(f"the old checkpoint {folder(run, 10)} cannot be deleted: ")
    assert folder(run, 10).exists()


def test_a_giant_configuration_is_refused_before_it_is_built(run):
    found = checkpoints.find(run)
    for sizes in ({"n_layer": 10**9}, {"vocab_size": 10**12}, {"n_inner": 2**60}):
        giant = dataclasses.replace(found, model=dataclasses.replace(found.model, **sizes))
        with pytest.raises(UsageError, match=r"it has [\d,]+ numbers, and a model of that shape"):
            checkpoints.load_model(giant)


def write_meta(path, **changes):
    meta = json.loads((path / "meta.json").read_text()) | changes
    del meta["sha256"]
    meta["sha256"] = checkpoints._checksum(meta)
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "changes",
    [{"step": "30"}, {"step": -1}, {"step": 0},
     {"step": True}, {"metrics": []}, {"progress": 3}, {"model": 1},
     {"model": {"n_layer": 0}}, {"files": ["x"]}, {"files": {"nul\0": "x"}}],
    ids=str,
)  # fmt: skip
def test_a_meta_file_with_invalid_fields_is_damaged(changes, run):
    write_meta(folder(run, 30), **changes)
    with pytest.raises(checkpoints.DamagedError, match=r"step-00000030 is damaged: "):
        checkpoints.verify(folder(run, 30))
    assert checkpoints.find(run, "last").step == 20


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": 1' + "0" * 5_000 + "}", "\xff", ""])
def test_a_meta_file_that_is_not_json_is_damaged(text, run):
    (folder(run, 30) / "meta.json").write_text(text)
    assert checkpoints.find(run, "last").step == 20


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name, run):
    (folder(run, 30) / name).unlink()
    os.mkfifo(folder(run, 30) / name)
    assert checkpoints.find(run, "last").step == 20


def test_a_pipe_as_a_pointer_is_refused_and_not_waited_for(run):
    (run / "best").unlink()
    os.mkfifo(run / "best")
    with pytest.raises(UsageError, match="the pointer .*best is a pipe"):
        checkpoints.find(run, "best")


@pytest.fixture
def linked(run, tmp_path, tiny_model):
    """A run whose checkpoints are a link to those of ``run``."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(run / "checkpoints")
    return other


def test_pruning_through_a_link_deletes_only_what_this_run_wrote(linked, run, tiny_model):
    before = {p.name for p in (run / "checkpoints").iterdir()}
    own = []
    for step in (31, 32, 33):
        save(linked, step, tiny_model)
        own.append(checkpoints.name_of(step))
        checkpoints.point(linked, "last", own[-1])
        checkpoints.prune(linked, keep=1, own=own)
    assert {p.name for p in (run / "checkpoints").iterdir()} == before | {"step-00000033"}


def test_a_checkpoint_of_another_run_is_renamed_and_not_replaced(linked, run, tiny_config):
    theirs = checkpoints.load_model(checkpoints.verify(folder(run, 30)))
    save(linked, 30, make_model(tiny_config, seed=9))
    kept = folder(run, 30).with_name("replaced-step-00000030")
    found = checkpoints.load_model(checkpoints.verify(kept))
    assert torch.equal(found.embed.weight, theirs.embed.weight)


def test_a_checkpoint_that_is_a_link_is_deleted_as_a_link(run, tmp_path):
    folder(run, 10).rename(tmp_path / "elsewhere")
    folder(run, 10).symlink_to(tmp_path / "elsewhere")
    assert checkpoints.prune(run, keep=1) == []
    assert not folder(run, 10).is_symlink()
    assert (tmp_path / "elsewhere" / "meta.json").exists()
