"""Checkpoints that a thread writes during training."""

import threading

import pytest
import torch

from gpt import checkpoint as checkpoints
from gpt.checkpoint import State
from gpt.config import CheckpointConfig, UsageError
from gpt.training.parallel import World
from gpt.training.saving import Saver


@pytest.fixture
def state(tiny_model):
    def make(step):
        return State(
            step=step,
            model=tiny_model.config,
            weights=dict(tiny_model.named_parameters()),
            training={"embed.weight/step": torch.tensor(float(step))},
            progress={"losses": [0.1]},
            metrics={},
        )

    return make


class Gate:
    """A disk that blocks until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.at_work, self.most = threading.Event(), 0, 0
        save = checkpoints.save

        def wait(run, state, **options):
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            assert self.open.wait(timeout=20)
            path = save(run, state)
            self.at_work -= 1
            return path

        monkeypatch.setattr(checkpoints, "save", wait)


class Together(World):
    """A world that records when it waits for the others."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def wait_for_all(self):
        self.log.append("all are here")


def test_processes_wait_for_each_other_before_they_copy(state, tmp_path, monkeypatch):
    log = []
    for name in ("_join", "_copy", "check"):
        method = getattr(Saver, name)

        def logged(self, *args, name=name, method=method):
            log.append(name)
            return method(self, *args)

        monkeypatch.setattr(Saver, name, logged)
    with Saver(tmp_path, CheckpointConfig(), Together(log)) as saver:
        saver.save(state(1), best=None)
        assert log == ["_join", "all are here", "check", "_copy", "_copy"]
        log.clear()
    assert log == ["_join", "all are here", "check"]


def test_a_checkpoint_has_the_weights_of_its_step_despite_later_steps(
    state, tiny_model, tmp_path, monkeypatch
):
    gate = Gate(monkeypatch)
    before = tiny_model.embed.weight.detach().clone()
    with Saver(tmp_path, CheckpointConfig(), World()) as saver:
        saver.save(state(1), best=None)
        assert not (tmp_path / "last").exists()  # training continues at once
        with torch.no_grad():
            tiny_model.embed.weight.zero_()
        gate.open.set()
    saved = checkpoints.load_model(checkpoints.find(tmp_path, "last"))
    assert torch.equal(saved.embed.weight, before)


def test_the_end_of_the_run_waits_for_the_last_checkpoint(state, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    with Saver(tmp_path, CheckpointConfig(), World()) as saver:
        saver.save(state(3), best="step-00000003")
    assert (tmp_path / "last").read_text() == (tmp_path / "best").read_text() == "step-00000003\n"


def test_at_most_one_checkpoint_is_being_written(state, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with Saver(tmp_path, CheckpointConfig(keep=9), World()) as saver:
        saver.save(state(1), best=None)
        threading.Timer(0.2, gate.open.set).start()
        saver.save(state(2), best=None)
        saver.save(state(3), best=None)
    assert gate.most == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert saver.stalls[0] < saver.stalls[1]  # the second one waited


def test_all_copies_use_the_same_memory(state, tmp_path):
    with Saver(tmp_path, CheckpointConfig(), World()) as saver:
        saver.save(state(1), best=None)
        places = {name: copy.data_ptr() for name, copy in saver._copies.items()}
        saver.save(state(2), best=None)
        assert places == {name: copy.data_ptr() for name, copy in saver._copies.items()}


def test_an_error_in_the_thread_is_raised_at_the_next_step_with_the_last_complete_checkpoint(
    state, tmp_path, monkeypatch
):
    with Saver(tmp_path, CheckpointConfig(), World()) as saver:
        saver.save(state(1), best=None)

    def full(run, state, **options):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(checkpoints, "save", full)
    saver.save(state(2), best=None)
    saver._thread.join()
    with pytest.raises(
        UsageError, match="No space left on device.*up to step-00000001 are complete"
    ):
        saver.check()
    saver.check()  # once
    saver.save(state(3), best=None)
    with pytest.raises(UsageError, match="No space left"), saver:
        pass


def test_a_second_ctrl_c_does_not_wait_for_the_disk(state, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path, CheckpointConfig(), World()) as saver:  # noqa: PT012
        saver.save(state(1), best=None)
        raise KeyboardInterrupt
    assert saver._thread.is_alive()
    assert saver._thread.daemon  # the end of the process does not wait either
    gate.open.set()
    saver._thread.join()


def test_records_are_on_the_disk_before_a_checkpoint_has_its_name(state, tmp_path):
    seen = []

    def flush():
        seen.append(sorted(p.name for p in tmp_path.glob("checkpoints/step-*")))

    with Saver(tmp_path, CheckpointConfig(), World(), flush=flush) as saver:
        saver.save(state(1), best=None)
        saver.save(state(2), best=None)
    assert seen == [[], ["step-00000001"]]


def test_the_newest_each_mth_and_the_best_checkpoint_stay(state, tmp_path):
    config = CheckpointConfig(keep=2, keep_every=4)
    with Saver(tmp_path, config, World()) as saver:
        for step in range(1, 11):
            saver.save(state(step), best="step-00000003" if step >= 3 else None)
    left = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert left == [3, 4, 8, 9, 10]
