"""A file of prompts to a file of completions: many at once, in order, and resumable."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt.config import GenerationConfig, UsageError
from gpt.data.jsonl import read_jsonl
from gpt.data.tokenizer import Tokenizer
from gpt.generation.text import Completion, Continuer, run
from gpt.model.gpt import GPT

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
    first = _lines_written(out, items)
    waiting: dict[int, list[Completion]] = {}
    next_one = first
    tokens = 0
    with out.open("a", encoding="utf-8") as file:
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


def _line(item: dict[str, Any], completions: list[Completion]) -> str:
    ordered = sorted(completions, key=lambda completion: completion.sample)
    return json.dumps({**item, "completions": [_as_json(c) for c in ordered]}) + "\n"


def _as_json(completion: Completion) -> dict[str, Any]:
    content: dict[str, Any] = {"text": completion.text, "reason": completion.reason}
    if completion.logprobs:
        content |= {"tokens": completion.tokens, "logprobs": completion.logprobs}
        content |= {"top": completion.top} if any(completion.top) else {}
        if completion.prompt_scores is not None:
            content["prompt_logprobs"] = completion.prompt_scores.logprobs
    return content


def _lines_written(out: Path, items: list[dict[str, Any]]) -> int:
    """How many whole lines ``out`` has; what follows them is cut off."""
    if not out.exists():
        return 0
    lines = out.read_bytes().split(b"\n")
    whole, rest = lines[:-1], lines[-1]
    for number, line in enumerate(whole, 1):
        try:
            written = json.loads(line)
            same = number <= len(items) and written["prompt"] == items[number - 1]["prompt"]
            same = same and "completions" in written
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UsageError(
                f"{out} line {number} is not of prompt {number}: it was made from other prompts, "
                "and another out keeps both"
            )
    if rest:
        os.truncate(out, out.stat().st_size - len(rest))
    return len(whole)
