"""How far a preparation is: shares, rates and the time that is left."""

import pytest

from gpt.commands.prepare import line
from gpt.data import progress
from gpt.data.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rates_and_the_time_left_are_those_since_the_resumption(clock):
    done = Progress([1_000_000, 3_000_000])
    done.resume(1_000_000, 500)
    clock[0] += 10
    done.tap(bytes(1_000_000))
    done.tokens += 200
    assert done.share == 0.5
    assert done.bytes_per_second == 100_000
    assert done.tokens_per_second == 20
    assert done.seconds_left == 20
    assert line(done) == "50%, 700 tokens, 0.1 MB/s, 20 tokens/s, 0:00:20 left"


def test_without_a_size_no_share_and_no_time_is_told(clock):
    done = Progress([10, None])
    clock[0] += 1
    done.tap(b"12345")
    assert line(done) == "0 tokens, 0.0 MB/s, 0 tokens/s"
    assert line(Progress([0])) == "0 tokens, 0.0 MB/s, 0 tokens/s"
