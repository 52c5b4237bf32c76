"""Sequences in windows: nothing is lost, nothing overflows, little is wasted."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.packing import pack


@given(st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_every_sequence_is_in_one_window_with_room(case):
    capacity, lengths = case
    windows = pack(lengths, capacity)
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in window) <= capacity for window in windows)
    used = [sum(lengths[i] for i in window) for window in windows]
    assert all(a + b > capacity for n, a in enumerate(used) for b in used[:n])  # else they were one


@given(st.lists(st.integers(1, 9)))
def test_each_sequence_goes_into_the_fullest_window_that_has_room(lengths):
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [n for n, room in enumerate(rooms) if room >= lengths[i]]
        chosen = min(fitting, key=lambda n: rooms[n], default=len(rooms))
        if chosen == len(rooms):
            rooms.append(9)
        rooms[chosen] -= lengths[i]
    packed = [9 - sum(lengths[i] for i in window) for window in pack(lengths, 9)]
    assert sorted(packed) == sorted(rooms)


def test_records_of_20_to_400_tokens_fill_windows_of_1024():
    lengths = np.random.default_rng(0).integers(20, 401, 5000)
    windows = pack(lengths, 1024)
    assert lengths.sum() / (len(windows) * 1024) > 0.99
