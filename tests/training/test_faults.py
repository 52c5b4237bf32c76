"""Failing disks and killed runs; `make soak` does the same for longer."""

import re

import pytest

from tests.soak import runs


@pytest.fixture
def place(tmp_path):
    if runs.build(tmp_path) is None:
        pytest.skip("needs Linux and a C compiler")
    return tmp_path


def test_a_disk_that_fails_at_any_call_costs_no_checkpoint_and_changes_no_result(place):
    told, *problems = runs.serve(place, "inject", {"stride": 6})
    assert problems == []
    assert int(told.split()[0]) > 40
    assert int(re.search(r"(\d+) ended it in a sentence", told)[1]) > 20  # the faults had an effect


def test_a_sharded_checkpoint_is_complete_or_absent(place):
    told, *problems = runs.serve(place, "inject_sharded", {"stride": 2})
    assert problems == []
    assert int(told.split()[0]) > 15
    assert int(told.split(", ")[1].split()[0]) > 5


def test_a_full_disk_ends_the_run_in_a_sentence(place):
    [sentence] = runs.serve(place, "fill", {})
    assert sentence.startswith(f"a checkpoint of {place / 'faulty' / 'run'} cannot be written: ")
    assert "No space left on device" in sentence
    assert sentence.endswith(
        "; those up to step-00000004 are complete, and --resume continues from there"
    )


def test_runs_that_are_killed_at_any_time_give_the_uninterrupted_result(place):
    hits, whole, *killed = runs.serve(place, "kill", {"n_runs": 4, "kills": 3})
    assert int(hits) >= 6  # of 12; a late one can come after the end of the run
    assert killed == [whole] * 4
