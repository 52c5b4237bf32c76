"""Rewards: functions of a prompt, a text that continues it, and the prompt's record."""

import contextlib
import importlib.util
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt.config import ObjectiveConfig, UsageError, foreign, quoted
from gpt.data.compression import extra
from gpt.data.records import Record

Reward = Callable[[str, str, Record], float]
"""``reward(prompt, text, record)``: a finite number; the higher, the better the text."""


def reward_of(config: ObjectiveConfig) -> Reward:
    """The function that ``config.reward`` names. ``UsageError`` if there is none, and later, in one
    sentence, for each failure of the user's function and each result that is not a finite number.
    """
    ready = READY.get(config.reward)
    return ready(config) if ready else _from_file(config.reward)


def _regex(config: ObjectiveConfig) -> Reward:
    pattern = re.compile(config.pattern)
    return lambda prompt, text, record: float(pattern.search(text) is not None)


def _length(config: ObjectiveConfig) -> Reward:
    wanted = config.length
    return lambda prompt, text, record: 1 - abs(len(text) - wanted) / wanted


def _bleu(config: ObjectiveConfig) -> Reward:
    """Sentence BLEU (Papineni et al., 2002; Post, 2018) of sacrebleu, from 0 to 1."""
    sacrebleu = extra("sacrebleu", "objective.reward bleu", "bleu")

    def reward(prompt: str, text: str, record: Record) -> float:
        score: float = sacrebleu.sentence_bleu(text, references(record)).score
        return score / 100

    return reward


def references(record: Record) -> list[str]:
    """The texts in a record that BLEU compares with; ``UsageError`` if there are none."""
    found = record.get("references", record.get("reference"))
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(t, str) for t in found):
        raise UsageError(
            f"the record of the prompt {quoted(record['prompt'][:40])} has {quoted(found)} as its "
            'references, and objective.reward bleu needs a text in "reference", or a list of texts '
            'in "references"'
        )
    return found


READY: dict[str, Callable[[ObjectiveConfig], Reward]] = {
    "bleu": _bleu,
    "regex": _regex,
    "length": _length,
}


def _from_file(place: str) -> Reward:
    """The user's function, which ``place`` names as ``file.py:function``."""
    name, _, function = place.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"objective.reward is {quoted(place)}, and {foreign(path)} does not exist")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"objective.reward is {quoted(place)}, which Python cannot import")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failed(path, "cannot be imported", error) from error
    call: Any = getattr(module, function, None)
    if not callable(call):
        raise UsageError(
            f"objective.reward is {quoted(place)}, and {foreign(path)} has no function {function}"
        )

    def reward(prompt: str, text: str, record: Record) -> float:
        try:
            result = call(prompt, text, record)
        except (Exception, SystemExit) as error:
            raise _failed(path, f"{function} failed", error) from error
        number = math.nan
        if not isinstance(result, str | bytes | bytearray):
            with contextlib.suppress(Exception):
                number = float(result)
        if not math.isfinite(number):
            raise UsageError(
                f"{function} of {foreign(path)} returned {quoted(result)} for the text "
                f"{quoted(text[:40])}, and must return a finite number"
            )
        return number

    return reward


def _failed(path: Path, what: str, error: BaseException) -> UsageError:
    """A sentence with the last line of the user's file that took part in an error."""
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        line = line or next(
            (f.lineno for f in reversed(frames) if Path(f.filename) == path.absolute()), None
        )
    at = f" line {line}" if line else ""
    reason = foreign(error.msg if isinstance(error, SyntaxError) else error)
    return UsageError(
        f"objective.reward: {foreign(path)}{at}: {what}: {type(error).__name__}: {reason}"
    )
