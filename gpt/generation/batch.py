"""A file of prompts to a file of completions: many at once, in order, and resumable."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from gpt.config import GenerationConfig, UsageError
from gpt.data.jsonl import read_jsonl
from gpt.data.tokenizer import Tokenizer
from gpt.generation.checks import check_prompt
from gpt.generation.text import Completion, Continuer, encode_prompt, run
from gpt.model.gpt import GPT

if sys.platform != "win32":
    import fcntl

Progress = Callable[[int, int, int], None]


def continue_file(
    model: tuple[GPT, Tokenizer],
    prompts: Path,
    out: Path,
    config: GenerationConfig,
    *,
    decoder: Continuer,
    progress: Progress = lambda done, prompts, tokens: None,
) -> int:
    """Continue each ``prompt`` of a JSONL file, and write its line with ``completions`` to ``out``.

    Lines are written in order, each whole. Those that ``out`` has already are kept, and the rest is
    added; a last line that is not whole is written again. ``UsageError`` if ``out`` has the lines
    of other prompts. ``progress`` is told the prompts that are done, all prompts, and the tokens
    written; the number of prompts that were continued is returned.
    """
    items = read_jsonl(prompts, {"prompt": str})
    for number, item in enumerate(items, 1):
        try:
            check_prompt(
                model[0], encode_prompt(model[1], item["prompt"]), config, model[1].vocab_size
            )
        except UsageError as error:
            raise UsageError(
                f"{prompts} prompt {number}, {item['prompt'][:40]!r}: {error}"
            ) from None
    if out.is_dir():
        raise UsageError(f"out is {out}, which is a folder, and must be a .jsonl file")
    if not out.parent.is_dir():
        raise UsageError(f"out is {out}, and there is no folder {out.parent}")
    waiting: dict[int, list[Completion]] = {}
    tokens = 0
    with out.open("a", encoding="utf-8") as file:
        _lock(file, out)
        first = next_one = _lines_written(out, items, config.num_samples)
        texts = [item["prompt"] for item in items[first:]]
        progress(first, len(items), 0)
        for _, completion in run(model, texts, config, decoder=decoder):
            if completion.reason is None:
                continue
            tokens += len(completion.tokens)
            waiting.setdefault(first + completion.prompt, []).append(completion)
            while len(waiting.get(next_one, ())) == config.num_samples:
                file.write(_line(items[next_one], waiting.pop(next_one)))
                file.flush()
                next_one += 1
            progress(next_one, len(items), tokens)
        os.fsync(file.fileno())
    return len(items) - first


def _lock(file: TextIO, out: Path) -> None:
    """Keep other processes from writing to ``out`` as long as this one does."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another process is writing to {out}") from None


def _line(item: dict[str, Any], completions: list[Completion]) -> str:
    ordered = sorted(completions, key=lambda completion: completion.sample)
    return json.dumps(_bare(item) | {"completions": [_as_json(c) for c in ordered]}) + "\n"


def _bare(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "completions"}


def _as_json(completion: Completion) -> dict[str, Any]:
    content: dict[str, Any] = {"text": completion.text, "reason": completion.reason}
    if completion.score is not None:
        content["score"] = completion.score
    if completion.logprobs:
        content |= {"tokens": completion.tokens, "logprobs": completion.logprobs}
        content |= {"top": completion.top} if any(completion.top) else {}
        if completion.prompt_scores is not None:
            content["prompt_logprobs"] = completion.prompt_scores.logprobs
            content |= {"prompt_top": completion.prompt_scores.top} if any(completion.top) else {}
    return content


def _lines_written(out: Path, items: list[dict[str, Any]], num_samples: int) -> int:
    """How many whole lines ``out`` has; what follows them is cut off."""
    if not out.exists():
        return 0
    lines = out.read_bytes().split(b"\n")
    whole, rest = lines[:-1], lines[-1]
    for number, line in enumerate(whole, 1):
        try:
            written = json.loads(line)
            same = number <= len(items) and written["prompt"] == items[number - 1]["prompt"]
            samples = len(written["completions"])
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UsageError(
                f"{out} line {number} is not of prompt {number}: it was made from other prompts, "
                "and another out keeps both"
            )
        if samples != num_samples:
            raise UsageError(
                f"{out} line {number} has {samples} completions, and num_samples is {num_samples}: "
                "another out keeps both"
            )
    if rest and len(whole) < len(items):  # what is cut off has to be the beginning of a line
        line = json.dumps(_bare(items[len(whole)]) | {"completions": []})[:-2].encode()
        if not (rest.startswith(line) or line.startswith(rest)):
            raise UsageError(
                f"{out} ends with what is no completion of prompt {len(whole) + 1}: it was made "
                "from other prompts, and another out keeps both"
            )
    elif rest:
        raise UsageError(f"{out} has more in it than the completions of these prompts")
    if rest:
        os.truncate(out, out.stat().st_size - len(rest))
    return len(whole)
