import pytest

from gpt.config import OptimizerConfig, TrainingConfig
from gpt.training.schedule import learning_rate_factor, window_limit


def factors(schedule, steps=range(101), **options):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10, floor=0.1, **options)
    return [learning_rate_factor(s, max_steps=100, config=config) for s in steps]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_every_schedule_warms_up_linearly_and_never_trains_at_0(schedule):
    assert factors(schedule, range(11)) == pytest.approx([(s + 1) / 11 for s in range(11)])


def test_cosine_falls_from_the_warmup_to_the_floor():
    values = factors("cosine")
    assert values[10] == 1
    assert values[55] == pytest.approx(0.55)  # half-way, half between 1 and the floor
    assert values[100] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[10] - values[20] < values[50] - values[60]  # flat at first


def test_constant_stays_at_the_highest_rate():
    assert set(factors("constant")[10:]) == {1}


def test_wsd_holds_and_then_falls_linearly_to_the_floor():
    values = factors("wsd", decay_fraction=0.2)
    assert set(values[10:81]) == {1}
    assert values[90] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_the_rate_is_constant_after_max_steps(schedule):
    assert factors(schedule, [100, 101, 1000]) == [factors(schedule, [100])[0]] * 3


def test_a_warmup_as_long_as_the_run_is_all_warmup():
    config = OptimizerConfig(schedule="cosine", warmup_steps=100)
    assert learning_rate_factor(99, max_steps=100, config=config) == pytest.approx(100 / 101)
    assert learning_rate_factor(100, max_steps=100, config=config) == 1


def test_attention_windows_grow_in_steps_until_there_is_no_limit():
    config = TrainingConfig(max_steps=100, window_start=32, window_fraction=0.6)
    limits = [window_limit(step, config, context_length=120) for step in range(100)]
    assert limits[:60] == [32] * 20 + [64] * 20 + [96] * 20
    assert limits[60:] == [0] * 40
    usual = TrainingConfig(max_steps=100)
    assert {window_limit(step, usual, context_length=120) for step in range(100)} == {0}
