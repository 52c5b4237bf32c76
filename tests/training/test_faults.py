"""Failing disks and killed runs; `make soak` does it for longer, at each call of the system."""

import re

import pytest

from tests.soak import runs

WORK = {
    "inject": {"stride": 12},
    "inject_sharded": {"stride": 3},
    "fill": {},
    "kill": {"n_runs": 3, "kills": 3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    if runs.build(folder) is None:
        pytest.skip("needs Linux and a C compiler")
    return folder


@pytest.fixture(scope="module")
def told(place):
    """What one process, which imports torch once, says of all."""
    return runs.serve(place, WORK)


def test_a_disk_that_fails_at_any_call_costs_no_checkpoint_and_changes_no_result(told):
    said, *problems = told["inject"]
    assert problems == []
    assert int(said.split()[0]) > 20
    assert int(re.search(r"(\d+) ended it in a sentence", said)[1]) > 10  # the faults had an effect


def test_a_sharded_checkpoint_is_complete_or_absent(told):
    said, *problems = told["inject_sharded"]
    assert problems == []
    assert int(said.split()[0]) > 10
    assert int(said.split(", ")[1].split()[0]) > 3


def test_a_full_disk_ends_the_run_in_a_sentence(told, place):
    [sentence] = told["fill"]
    run = place / "fill" / "faulty" / "run"
    assert sentence.startswith(f"a checkpoint of {run} cannot be written: ")
    assert "No space left on device" in sentence
    assert sentence.endswith(
        "; those up to step-00000004 are complete, and --resume continues from there"
    )


def test_runs_that_are_killed_at_any_time_give_the_uninterrupted_result(told):
    hits, whole, *killed = told["kill"]
    assert int(hits) >= 4  # of 9; a late one can come after the end of the run
    assert killed == [whole] * 3
