"""A run's training curve as text, from its ``metrics.jsonl``."""

import itertools
from pathlib import Path

from gpt.training.metrics import read_record

HELD_OUT = "validation_loss"

_DOTS = (
    (0x01, 0x08),
    (0x02, 0x10),
    (0x04, 0x20),
    (0x40, 0x80),
)  # of a braille cell, by row and column


def draw_curve(
    metrics: Path, *, width: int = 64, height: int = 12, ascii_only: bool = False
) -> str:
    """The training loss as a line and each validation loss as an ``o``, by step; for a run that
    raises a reward, the rewards.

    ``width`` and ``height`` are the size of the plot in characters, without its axes. Returns an
    empty text if there are fewer than two records. ``ascii_only`` uses only ASCII characters.
    """
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [record for line in lines if (record := read_record(line))]
    of_steps, held_out = [r for r in records if "loss" in r], [r for r in records if HELD_OUT in r]
    names = ("reward", "reward") if any("reward" in r for r in records) else ("loss", HELD_OUT)
    training, validation = (
        [(r["step"], r[name]) for r in some if name in r]
        for some, name in zip((of_steps, held_out), names, strict=True)
    )
    values = [loss for _, loss in training + validation]
    if len(training) < 2:
        return ""
    last = max(step for step, _ in training)
    low, high = min(values), max(values)
    scale = (high - low) or 1.0

    cells = [[0] * width for _ in range(height)]
    for (x0, y0), (x1, y1) in itertools.pairwise(training):
        for i in range(33):  # dots along the line from one record to the next
            x = (x0 + (x1 - x0) * i / 32) / last * (2 * width - 1)
            y = (high - y0 - (y1 - y0) * i / 32) / scale * (4 * height - 1)
            row, column = round(y), round(x)
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    def drawn(cell: int) -> str:
        dots = "." if ascii_only else chr(0x2800 + cell)
        return dots if cell else " "

    rows = [[drawn(cell) for cell in line] for line in cells]
    for step, loss in validation:
        row = round((high - loss) / scale * (4 * height - 1)) // 4
        rows[row][round(step / last * (2 * width - 1)) // 2] = "o"

    marks = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    side, corner, line = ("|", "+", "-") if ascii_only else ("┤", "└", "─")
    lines = [f"{marks.get(i, ''):>6} {side}{''.join(row).rstrip()}" for i, row in enumerate(rows)]
    axis = f"{'':>6} {corner}{line * width}"
    return "\n".join([*lines, axis, f"{'0':>8}{f'step {last:,}':>{width}}"])
