"""Checkpoints of older versions, converted to the present one by pure functions.

Format 1 kept each optimizer's state in ``training.pt``, by the number of the parameter, and did not
say which checkpoint was the best. Format 2 got more fields of progress over time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def optimizer_state_of_format_1(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> dict[str, Tensor]:
    """The optimizers' state as ``parameter/name``. ``saved`` is what ``training.pt`` holds, and
    ``names`` are those of each optimizer's parameters, in order.
    """
    return {
        f"{of[number]}/{key}": value
        for of, state in zip(names, saved["optimizers"], strict=True)
        for number, values in state.items()
        for key, value in values.items()
    }


def progress_of_format_1(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The first version of format 2's progress, from what ``training.pt`` holds."""
    kept = {name: saved[name] for name in ("best_loss", "scaler")}
    return {"best": None, "losses": [], "skipped": 0, "overflows": 0} | kept


def complete_progress(progress: Mapping[str, Any]) -> dict[str, Any]:
    """Format 2's progress with the fields that its first versions did not have."""
    best: Any = progress.get("best_loss")
    return {"settings": {}, "place": {}, "least_loss": best, "stale": 0} | dict(progress)
