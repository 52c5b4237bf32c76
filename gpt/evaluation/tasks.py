"""Tasks from their published JSONL files: LAMBADA, HellaSwag, and multiple choice in general.

The scores are those of lm-evaluation-harness. LAMBADA (arXiv:1606.06031): the last word of a
passage, as released by OpenAI or detokenised. HellaSwag (arXiv:1905.07830): the likeliest of four
endings. ``acc`` compares log-probabilities, ``acc_norm`` log-probabilities divided by the length.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.jsonl import read_jsonl
from gpt.data.tokenizer import Tokenizer
from gpt.evaluation.likelihood import Likelihood, encode_pair, likelihoods
from gpt.evaluation.perplexity import perplexity_of
from gpt.model.gpt import GPT

_HELLASWAG = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": object}
_CHOICES = {"context": str, "choices": list, "answer": int}


@dataclass(frozen=True)
class Metric:
    """The mean over the items of a task, and its standard error."""

    value: float
    standard_error: float


def lambada(
    model: GPT, tokenizer: Tokenizer, path: Path, *, batch_size: int = 0
) -> dict[str, Metric]:
    """``acc``: whether every token of the last word is the likeliest; ``perplexity`` of the last
    word.
    """
    requests = []
    for number, item in enumerate(read_jsonl(path, {"text": str}), 1):
        context, _, word = item["text"].strip().rpartition(" ")
        if not context:
            raise UsageError(f"{foreign(path)} item {number} has fewer than two words")
        requests.append(encode_pair(tokenizer, context, " " + word))
    scores = likelihoods(model, requests, batch_size=batch_size)
    loss = _mean([-score.total for score in scores])
    perplexity = perplexity_of(loss.value)
    return {
        "acc": _mean([float(score.is_greedy) for score in scores]),
        "perplexity": Metric(perplexity, perplexity * loss.standard_error),
    }


def hellaswag(
    model: GPT, tokenizer: Tokenizer, path: Path, *, batch_size: int = 0
) -> dict[str, Metric]:
    """``acc`` and ``acc_norm`` over items with ``activity_label, ctx_a, ctx_b, endings, label``."""
    items = []
    for number, item in enumerate(read_jsonl(path, _HELLASWAG), 1):
        context = item["activity_label"] + ": " + item["ctx_a"] + " " + item["ctx_b"].capitalize()
        label = str(item["label"])
        answer = int(label) if label.isdecimal() and len(label) < 10 else -1
        endings = _checked(path, number, item["endings"], answer)
        items.append((_clean(context), [_clean(ending) for ending in endings], answer))
    return _choose(model, tokenizer, items, batch_size)


def multiple_choice(
    model: GPT, tokenizer: Tokenizer, path: Path, *, batch_size: int = 0
) -> dict[str, Metric]:
    """``acc`` and ``acc_norm`` over items with ``context``, ``choices`` and ``answer`` (from 0)."""
    items = []
    for number, item in enumerate(
        read_jsonl(path, {"context": str, "choices": list, "answer": int}), 1
    ):
        choices = _checked(path, number, item["choices"], item["answer"])
        items.append((item["context"], choices, item["answer"]))
    return _choose(model, tokenizer, items, batch_size)


def _checked(path: Path, number: int, choices: list[Any], answer: int) -> list[str]:
    """The choices. ``UsageError`` unless they are texts and ``answer`` is the index of one."""
    if not all(isinstance(choice, str) and _clean(choice) for choice in choices):
        raise UsageError(
            f"{foreign(path)} item {number} has the choices {quoted(choices)}, which must be texts"
        )
    if not 0 <= answer < len(choices):
        raise UsageError(
            f"{foreign(path)} item {number} has the answer {answer} and {len(choices)} choices; "
            "the answer must be the index of a choice, from 0"
        )
    return choices


def _choose(
    model: GPT, tokenizer: Tokenizer, items: list[tuple[str, list[str], int]], batch_size: int
) -> dict[str, Metric]:
    requests = [encode_pair(tokenizer, c, " " + choice) for c, cs, _ in items for choice in cs]
    scores = iter(likelihoods(model, requests, batch_size=batch_size))
    hits, hits_by_length = [], []
    for _, choices, answer in items:
        own: list[Likelihood] = [next(scores) for _ in choices]
        totals = [score.total for score in own]
        by_length = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
        hits.append(float(totals.index(max(totals)) == answer))
        hits_by_length.append(float(by_length.index(max(by_length)) == answer))
    return {"acc": _mean(hits), "acc_norm": _mean(hits_by_length)}


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _mean(values: list[float]) -> Metric:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Metric(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Metric(mean, math.sqrt(variance / n))
