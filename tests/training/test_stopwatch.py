import json

import pytest
import torch

from gpt.training import stopwatch
from gpt.training.stopwatch import Forecast, Stopwatch, Trace

CPU = torch.device("cpu")


def test_each_part_has_its_own_time_per_step(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 21.0, 30.0, 30.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    for part in ("data", "forward", "forward", "optimizer"):
        with watch(part):
            pass
    assert watch.take(2) == {
        "data_seconds": 0.5,
        "forward_seconds": 2.5,
        "backward_seconds": 0.0,
        "optimizer_seconds": 0.25,
    }
    assert set(watch.take(1).values()) == {0.0}
    [line] = watch.summary()
    assert line == "a step took 2166.7 ms: data 15%, forward 77%, backward 0%, optimizer 8%"


def test_a_run_without_steps_has_no_summary():
    assert Stopwatch(CPU).summary() == []


def test_a_trace_has_the_steps_after_the_warmup(tmp_path):
    trace = Trace(tmp_path / "trace.json", 2, device=CPU)
    written = []
    for step in range(6):
        with torch.profiler.record_function(f"the step {step}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        written.append(trace.step())
    trace.close()
    assert written == [False, False, False, True, False, False]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["name"] for e in events if "the step" in e.get("name", "")} == {
        "the step 2",
        "the step 3",
    }


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_ends_early_writes_its_trace_so_far(steps, tmp_path):
    trace = Trace(tmp_path / "trace.json", 9, device=CPU)
    for _ in range(steps):
        trace.step()
    trace.close()
    assert (tmp_path / "trace.json").exists() == (steps > Trace.WARMUP)


def test_no_trace_costs_nothing(tmp_path):
    trace = Trace(tmp_path / "trace.json", 0, device=CPU)
    assert not any(trace.step() for _ in range(5))
    trace.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "steps", "length"),
    [
        (0.05, 1200, "about 70 seconds"),
        (0.25, 1200, "about 5 minutes"),
        (2.0, 10_000, "about 5 h 34 min"),
    ],
)
def test_a_run_estimates_its_length_once_after_a_second_of_steps(seconds, steps, length):
    forecast = Forecast(steps=steps, evaluations=5, evaluation_seconds=2.0)
    said = [forecast.add(9.0), *(forecast.add(seconds) for _ in range(40))]
    told = [text for text in said if text]
    assert told == [f"this run takes {length} on this machine"]
    before = said.index(told[0])
    assert (before - 1) * seconds < 1 <= before * seconds + 1e-9


def test_a_resumed_run_is_forecast_after_its_first_evaluation():
    forecast = Forecast(steps=100, evaluations=5, evaluation_seconds=None)
    assert [forecast.add(2.0) for _ in range(5)] == [None] * 5
    forecast.evaluated(20.0)
    forecast.evaluated(99.0)
    assert forecast.add(2.0) == "this run takes about 5 minutes on this machine"
