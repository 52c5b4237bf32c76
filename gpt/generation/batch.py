"""A file of prompts to a file of completions: many at a time, in order, and resumable."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign
from gpt.data.jsonl import read_jsonl
from gpt.data.tokenizer import Tokenizer
from gpt.files import as_training_text, check_output, parse_json, unwritable
from gpt.generation.checks import check_prompt
from gpt.generation.continuer import Continuer
from gpt.generation.text import Completion, encode_prompt, run
from gpt.model.gpt import GPT

if sys.platform != "win32":
    import fcntl

Progress = Callable[[int, int, int], None]


def continue_file(
    model: tuple[GPT, Tokenizer],
    prompts: Path,
    out: Path,
    decoder: Continuer,
    *,
    progress: Progress = lambda done, prompts, tokens: None,
) -> int:
    """Continue each ``prompt`` of a JSONL file, and write its line with ``completions`` to ``out``.

    Lines are written in order, and each one whole. Existing lines of ``out`` are kept, an
    incomplete last line is written again, and the rest is added. ``UsageError`` if ``out`` has the
    completions of other prompts, is not a file, or cannot be written. ``progress`` receives the
    number of finished prompts, of all prompts, and of new tokens. Returns the number of prompts
    that were continued.
    """
    config = decoder.config
    check_output(out, "out")
    items = read_jsonl(prompts, {"prompt": str})
    texts = [as_training_text(item["prompt"]) for item in items]
    for number, text in enumerate(texts, 1):
        try:
            check_prompt(model[0], encode_prompt(model[1], text), config, model[1].vocab_size)
        except UsageError as error:
            raise UsageError(
                f"{foreign(prompts)} prompt {number}, {text[:40]!r}: {error}"
            ) from None
    waiting: dict[int, list[Completion]] = {}
    tokens = 0
    with _opened(out) as file:
        _lock(file, out)
        first = next_one = _lines_written(file, out, items, config.num_samples)
        progress(first, len(items), 0)
        for _, completion in run(model, texts[first:], decoder):
            if completion.reason is None:
                continue
            tokens += len(completion.tokens)
            waiting.setdefault(first + completion.prompt, []).append(completion)
            while len(waiting.get(next_one, ())) == config.num_samples:
                _append(file, out, _line(items[next_one], waiting.pop(next_one)))
                next_one += 1
            progress(next_one, len(items), tokens)
        _flush(file, out)
    return len(items) - first


def _opened(out: Path) -> FileIO:
    try:
        return FileIO(out, "a")
    except OSError as error:
        raise unwritable(out, error) from None


def _append(file: FileIO, out: Path, line: bytes) -> None:
    """Write the whole ``line``, or nothing."""
    end = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(file.fileno(), end)
        raise unwritable(out, error) from None


def _flush(file: FileIO, out: Path) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(out, error) from None


def _lock(file: FileIO, out: Path) -> None:
    """Lock ``out`` against other processes that continue prompts, until ``file`` is closed."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another process is writing to {foreign(out)}") from None


def _line(item: dict[str, Any], completions: list[Completion]) -> bytes:
    ordered = sorted(completions, key=lambda completion: completion.sample)
    line = json.dumps(_bare(item) | {"completions": [_as_json(c) for c in ordered]})
    return line.encode() + b"\n"


def _bare(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "completions"}


def _as_json(completion: Completion) -> dict[str, Any]:
    content: dict[str, Any] = {"text": completion.text, "reason": completion.reason}
    if completion.score is not None:
        content["score"] = completion.score
    if completion.logprobs:
        content |= {"tokens": completion.tokens, "logprobs": completion.logprobs}
        content |= {"top": completion.top} if any(completion.top) else {}
        if completion.prompt_details is not None:
            content["prompt_logprobs"] = [token.logprob for token in completion.prompt_details]
            if any(completion.top):
                content["prompt_top"] = [token.top for token in completion.prompt_details]
    return content


def _lines_written(file: FileIO, out: Path, items: list[dict[str, Any]], num_samples: int) -> int:
    """The number of complete lines in ``out``. A last line that lacks only its line end gets it; an
    incomplete one is removed.
    """
    *whole, rest = out.read_bytes().split(b"\n")
    name = foreign(out)
    if rest and len(whole) < len(items) and _completions(rest, items[len(whole)]) is not None:
        whole.append(rest)
        rest = b""
        _append(file, out, b"\n")
    for number, line in enumerate(whole, 1):
        completions = _completions(line, items[number - 1]) if number <= len(items) else None
        if completions is None:
            raise UsageError(
                f"{name} line {number} does not belong to prompt {number}: it was made from other "
                "prompts; choose another out"
            )
        if len(completions) != num_samples:
            raise UsageError(
                f"{name} line {number} has {len(completions)} completions, and num_samples is "
                f"{num_samples}; choose another out"
            )
    if rest and len(whole) < len(items):  # remove only the beginning of the next line
        line = json.dumps(_bare(items[len(whole)]) | {"completions": []})[:-2].encode()
        if not (rest.startswith(line) or line.startswith(rest)):
            raise UsageError(
                f"the end of {name} does not belong to prompt {len(whole) + 1}: it was made from "
                "other prompts; choose another out"
            )
    elif rest:
        raise UsageError(f"{name} has text after its last completion; choose another out")
    if rest:
        os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - len(rest))
    return len(whole)


def _completions(line: bytes, item: dict[str, Any]) -> list[Any] | None:
    """The completions in a line of ``out``, if it is complete and has the prompt of ``item``."""
    try:
        written = parse_json(line.decode(), "a line")
        same = written["prompt"] == item["prompt"]
        completions = written["completions"]
    except (ValueError, KeyError, TypeError):
        return None
    return completions if same and isinstance(completions, list) else None
