"""Examples: token sequences in which some tokens count in the loss, and their files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError, foreign
from gpt.data.byte_pair import Ids
from gpt.files import unreadable

ARRAYS = ("ids", "counted", "ends")


@dataclass(frozen=True)
class Example:
    """A sequence of ids ``[n]``, and which of them count in the loss as targets, ``[n]``."""

    ids: Ids
    counted: NDArray[np.bool_]


@dataclass(frozen=True)
class Examples:
    """Examples one after the other, memory-mapped. Example ``i`` is ``ids[ends[i - 1] : ends[i]]``;
    its first id comes after nothing.
    """

    path: Path
    ids: Ids
    counted: NDArray[np.bool_]
    ends: NDArray[np.int64]
    corpus: bytes
    """The fingerprint of the records."""

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, i: int) -> Example:
        """The example number ``i``."""
        part = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        return Example(self.ids[part], self.counted[part])

    def question(self, i: int) -> tuple[list[int], list[int]] | None:
        """The prompt of the last answer in example ``i``, and that answer; ``None`` for an example
        without a prompt, such as a text.
        """
        ids, counted = self.example(i).ids, self.example(i).counted
        uncounted = np.flatnonzero(~counted)
        end = len(ids) - int(counted[::-1].argmax())
        before = uncounted[uncounted < end]
        if not len(before):
            return None
        start = int(before[-1]) + 1
        return ids[:start].tolist(), ids[start:end].tolist()


def save_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write the arrays of ``examples`` into ``folder``."""
    np.save(folder / "ids.npy", np.concatenate([e.ids for e in examples]))
    np.save(folder / "counted.npy", np.concatenate([e.counted for e in examples]))
    np.save(folder / "ends.npy", np.cumsum([len(e.ids) for e in examples]))


def load_examples(folder: Path, corpus: bytes) -> Examples:
    """Map what :func:`save_examples` wrote. ``UsageError`` if it is damaged."""
    arrays = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise unreadable(path, "the examples", error) from None
        except ValueError as error:
            raise UsageError(
                f"{foreign(path)} is damaged ({foreign(error)}); delete its folder"
            ) from None
    ids, counted, ends = (arrays[name] for name in ARRAYS)
    if not len(ids) == len(counted) == ends[-1] or (np.diff(ends, prepend=0) <= 0).any():
        raise UsageError(f"{foreign(folder)} is damaged: its arrays differ; delete its folder")
    return Examples(folder, ids, counted, ends, corpus)
