"""Draw the README's pictures from a run: ``python docs/pictures.py runs/shakespeare``.

They show the terminal output as SVG files: ``training.svg`` is the curve of the run, and
``explained.svg`` is a continuation with each character shaded by its probability.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from gpt.generation.explain import as_text, explain
from gpt.generation.text import generate
from gpt.interop.load import load
from gpt.training.curve import draw_curve

PROMPT, N_TOKENS, SEED = "ROMEO:", 240, 1
COLUMNS = 76
COLUMN = 12.2
"""The width of a character in rich's SVG."""
FRAME = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-size: {char_height}px; white-space: pre;
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#272822"/>
<g transform="translate(9, 24)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""rich's frame, without fonts from the network."""


def picture(text: Text, name: str) -> str:
    """``text`` on a terminal of 76 columns, as SVG that needs no other file."""
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        emoji=False,
        highlight=False,
    )
    console.print(text)
    svg = console.export_svg(theme=MONOKAI, code_format=FRAME, unique_id=name)
    return re.sub(r' x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"', _by_columns, svg)


def _by_columns(found: re.Match[str]) -> str:
    """Put each character at its own column, because braille and box characters may have other
    widths.
    """
    x, y, length = (float(number) for number in found.groups())
    columns = " ".join(f"{x + i * COLUMN:g}" for i in range(round(length / COLUMN)))
    return f' x="{columns}" y="{y:g}"'


def draw(run: Path, folder: Path) -> None:
    """Write the pictures of ``run`` into ``folder``."""
    model = load(run)
    [completion] = generate(model, PROMPT, max_new_tokens=N_TOKENS, seed=SEED)
    prompt = model.tokenizer.encode(PROMPT).tolist()
    tokens = explain(model, prompt, completion.tokens)
    first = model.tokenizer.decode_bytes(prompt[:1]).decode()
    pictures = {
        "training": Text(draw_curve(run / "metrics.jsonl")),
        "explained": as_text(tokens, opening=first),
    }
    for name, text in pictures.items():
        (folder / f"{name}.svg").write_text(picture(text, name), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).parent)
