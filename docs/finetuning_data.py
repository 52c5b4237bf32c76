"""Write the records of docs/finetuning.md: ``python docs/finetuning_data.py FOLDER``.

``translate.jsonl`` has sentences in English and German, which simple rules make. ``voice.jsonl``
has conversations in which Shakespeare's characters answer each other. ``short.jsonl`` has pairs of
answers in Shakespeare's plays: a short one, which is chosen, and a long one. ``verse.jsonl`` has
prompts for verse: names of speakers.
"""

import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.data.shakespeare import play_files, speeches

SHORT, LONG = 30, 60
"""The most characters of a short answer, and the fewest of a long one."""
PROMPT, ROOM = 60, 125
"""The most characters of a prompt, and of a prompt with an answer."""
ASKED, ANSWERED = (20, 200), (60, 400)
"""The fewest and most characters of what a character hears and answers."""

PEOPLE = {
    "man": ("Mann", "m"), "woman": ("Frau", "f"), "child": ("Kind", "n"), "friend": ("Freund", "m"),
    "mother": ("Mutter", "f"), "father": ("Vater", "m"), "daughter": ("Tochter", "f"),
    "son": ("Sohn", "m"), "dog": ("Hund", "m"), "cat": ("Katze", "f"), "horse": ("Pferd", "n"),
}  # fmt: skip
"""English nouns that do something, with the German noun and its gender."""
THINGS = {
    "table": ("Tisch", "m"), "chair": ("Stuhl", "m"), "letter": ("Brief", "m"),
    "ring": ("Ring", "m"), "apple": ("Apfel", "m"), "lamp": ("Lampe", "f"), "rose": ("Rose", "f"),
    "clock": ("Uhr", "f"), "flower": ("Blume", "f"), "book": ("Buch", "n"), "house": ("Haus", "n"),
    "picture": ("Bild", "n"), "boat": ("Boot", "n"), "glass": ("Glas", "n"),
}  # fmt: skip
ADJECTIVES = {
    "old": "alt", "small": "klein", "red": "rot", "good": "gut", "new": "neu", "young": "jung",
    "poor": "arm", "strong": "stark", "warm": "warm", "white": "weiss",
}  # fmt: skip
VERBS = {
    "sees": "sieht", "buys": "kauft", "finds": "findet", "loves": "liebt", "paints": "malt",
    "seeks": "sucht", "brings": "bringt", "saw": "sah", "bought": "kaufte", "found": "fand",
    "loved": "liebte", "painted": "malte", "sought": "suchte", "brought": "brachte",
}  # fmt: skip
TIMES = {"today": "heute", "here": "hier", "then": "dann", "often": "oft"}
ENDINGS = {
    "m": {"the": ("der", "e"), "a": ("ein", "er")},
    "f": {"the": ("die", "e"), "a": ("eine", "e")},
    "n": {"the": ("das", "e"), "a": ("ein", "es")},
    "object m": {"the": ("den", "en"), "a": ("einen", "en")},
}
"""The German article, and the ending of an adjective behind it. Only a masculine object differs
from a subject."""


def noun_phrase(
    draws: random.Random, nouns: dict[str, tuple[str, str]], *, is_object: bool
) -> tuple[str, str]:
    """An article, perhaps an adjective, and a noun, in English and in German."""
    noun, (german, gender) = draws.choice([*nouns.items()])
    case = "object m" if is_object and gender == "m" else gender
    article = draws.choice(("the", "a"))
    german_article, ending = ENDINGS[case][article]
    if draws.random() < 0.4:
        return f"{_before(article, noun)} {noun}", f"{german_article} {german}"
    adjective, german_adjective = draws.choice([*ADJECTIVES.items()])
    return (
        f"{_before(article, adjective)} {adjective} {noun}",
        f"{german_article} {german_adjective}{ending} {german}",
    )


def _before(article: str, word: str) -> str:
    return "an" if article == "a" and word[0] in "aeiou" else article


def sentence(draws: random.Random) -> tuple[str, str]:
    """A sentence in English and in German. The German verb is always second."""
    subject, german_subject = noun_phrase(draws, PEOPLE, is_object=False)
    verb, german_verb = draws.choice([*VERBS.items()])
    thing, german_thing = noun_phrase(draws, THINGS, is_object=True)
    if draws.random() < 0.7:
        return f"{subject} {verb} {thing}.", f"{german_subject} {german_verb} {german_thing}."
    time, german_time = draws.choice([*TIMES.items()])
    return (
        f"{time} {subject} {verb} {thing}.",
        f"{german_time} {german_verb} {german_subject} {german_thing}.",
    )


def translations(n: int) -> list[dict[str, str]]:
    """``n`` instructions to translate a sentence into German or into English. No two are equal."""
    draws, made = random.Random(0), {}
    while len(made) < n:
        english, german = sentence(draws)
        if draws.random() < 0.5:
            made[f"In German: {english}\n"] = german
        else:
            made[f"In English: {german}\n"] = english
    return [{"prompt": prompt, "completion": answer} for prompt, answer in made.items()]


def answers() -> list[tuple[str, str]]:
    """What is said in the plays, with the speaker: ``("ROMEO", "Is the day so young?")``."""
    found = []
    for path in play_files():
        for speech in speeches(path.read_text(encoding="utf-8")).split("\n\n"):
            name, _, words = speech.strip().partition(":\n")
            found.append((name, words))
    return found


def conversations(said: list[tuple[str, str]], n: int) -> list[dict[str, Any]]:
    """``n`` pairs of speeches, one after the other in a play, as a question and its answer."""
    made = []
    for (_, first), (_, second) in itertools.pairwise(said):
        heard, answer = first.replace("\n", " "), second
        if _fits(heard, ASKED) and heard.endswith("?") and _fits(answer, ANSWERED):
            messages = [
                {"role": "user", "content": heard},
                {"role": "assistant", "content": answer},
            ]
            made.append({"messages": messages})
    return random.Random(0).sample(made, n)


def _fits(text: str, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(text) <= bounds[1]


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
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    said = answers()
    made: dict[str, Sequence[Any]] = {
        "translate": translations(4000),
        "voice": conversations(said, 1500),
        "short": pairs(said, 1500),
        "verse": speakers(said, 200),
    }
    for name, records in made.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
