"""A small share of ``make fuzz``."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="cases are forks with limits")
def test_some_dozen_odd_inputs_of_each_area_end_well_or_in_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "200"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
