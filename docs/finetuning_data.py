"""Write the records of docs/finetuning.md: ``python docs/finetuning_data.py FOLDER``.

``short.jsonl`` has pairs of answers in Shakespeare's plays: a short one, which is chosen, and a
long one. ``verse.jsonl`` has prompts for verse: names of speakers.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from gpt.data.shakespeare import play_files, speeches

SHORT, LONG = 30, 60
"""The most characters of a short answer, and the fewest of a long one."""
PROMPT, ROOM = 60, 125
"""The most characters of a prompt, and of a prompt with an answer."""


def answers() -> list[tuple[str, str]]:
    """What is said in the plays, with the speaker: ``("ROMEO", "Is the day so young?")``."""
    found = []
    for path in play_files():
        for speech in speeches(path.read_text(encoding="utf-8")).split("\n\n"):
            name, _, words = speech.strip().partition(":\n")
            found.append((name, words))
    return found


def pairs(said: list[tuple[str, str]], n: int) -> list[dict[str, str]]:
    """``n`` prompts that ask for an answer, with a short and a long one by any speaker."""
    draws = random.Random(0)
    short = [words for _, words in said if 5 <= len(words) <= SHORT]
    long = [words for _, words in said if len(words) >= LONG]
    made = []
    while len(made) < n:
        (name, words), (other, _) = draws.choice(said), draws.choice(said)
        prompt = f"{name}:\n{words}\n\n{other}:\n"
        if len(prompt) <= PROMPT:
            rejected = draws.choice(long)[: ROOM - len(prompt)]
            made.append({"prompt": prompt, "chosen": draws.choice(short), "rejected": rejected})
    return made


def speakers(said: list[tuple[str, str]], n: int) -> list[dict[str, str]]:
    """The ``n`` speakers with the most speeches, as prompts."""
    counts = Counter(name for name, _ in said)
    return [{"prompt": f"{name}:\n"} for name, _ in counts.most_common(n)]


def main(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    said = answers()
    for name, records in (("short", pairs(said, 1500)), ("verse", speakers(said, 200))):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
