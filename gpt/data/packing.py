"""Sequences of unlike lengths in windows of one length: best-fit decreasing bin packing.

The longest sequence goes first, each into the fullest window that has room for it (Ding et al.,
2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """The numbers of the sequences in each window of ``capacity`` tokens. ``lengths`` are from 1 to
    ``capacity``. Equal lengths stay in order, so the result depends on nothing else.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the tokens that are left
    rooms = 0  # bit r is set if a window has room for r tokens
    for i in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[i])
        if wide := rooms >> length:
            room = length + (wide & -wide).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(i)
        room -= length
        with_room[room].append(chosen)
        rooms |= 1 << room
    return bins
