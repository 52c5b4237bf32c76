"""The report of ``gpt evaluate``: each model's scores, as a table or as JSON."""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from gpt.config import DataConfig, EvaluateConfig, UsageError, Weights, foreign
from gpt.data.corpus import Corpus, open_corpus
from gpt.data.piped import copy
from gpt.data.tokenizer import Ids
from gpt.device import choose_device
from gpt.evaluation import tasks
from gpt.evaluation.held_out import held_out
from gpt.evaluation.perplexity import (
    TextScore,
    encode_text,
    ensemble,
    paired_bootstrap,
    score_text,
)
from gpt.evaluation.tasks import Metric
from gpt.generation.inference import InferenceGPT, choose_weights
from gpt.interop.load import Loaded, load
from gpt.interop.packed import is_packed
from gpt.model.surgery import extend_context

HELD_OUT = "held-out text"


@dataclass
class Report:
    """Metrics by model, task and name; in a paired comparison, also the difference of two
    models.
    """

    scores: dict[str, dict[str, dict[str, Metric]]] = field(default_factory=dict)
    difference: tuple[float, float, float] | None = None
    """Nats per token of the first model minus the second, and the ends of the 95 % interval."""


def _load(
    name: str, weights: Weights, device: torch.device, say: Callable[[str], None], adapter: str = ""
) -> Loaded:
    kind = choose_weights(weights, device)
    if adapter:
        return load(name, device=device, weights=weights, adapter=adapter, say=say)
    emulated = device.type == "cpu" and kind not in ("float32", choose_weights("auto", device))
    if emulated or kind in ("int8", "int4") or is_packed(name):
        return load(name, device=device, weights=weights, say=say)
    # Packing gains nothing for weights that are multiplied in their own dtype, so they stay in
    # their file.
    return load(name, device=device, dtype=getattr(torch, kind), say=say)


def _made_longer(name: str, loaded: Loaded, config: EvaluateConfig) -> Loaded:
    """The model with the rotary scaling that ``config`` asks for, in its context."""
    if config.rotary_scaling == "model":
        return loaded
    model, context = loaded.model, config.context_length
    own = model.config.resolved()
    if own.position not in ("rotary", "xpos"):
        raise UsageError(
            f"rotary_scaling is {config.rotary_scaling!r}, and the positions of {foreign(name)} "
            f"are {own.position}, which it cannot extend"
        )
    factor = config.rotary_scaling_factor or context / own.rotary_trained_length
    if config.rotary_scaling == "none":
        factor = 1.0
    elif factor <= 1 and not config.rotary_scaling_factor:
        raise UsageError(
            f"context_length is {context}, and a rotary_scaling needs more than the "
            f"{own.rotary_trained_length} tokens that {foreign(name)} was trained on"
        )
    longer = max(context, own.context_length)
    scaling = {"rotary_scaling": config.rotary_scaling, "rotary_scaling_factor": factor}
    extend_context(model, longer, **scaling)
    return loaded


def measure(config: EvaluateConfig, *, say: Callable[[str], None]) -> Report:
    """Run what ``config`` asks for, one model at a time. A paired comparison scores both models on
    windows of the shorter context.
    """
    with tempfile.TemporaryDirectory() as folder:  # each model reads the text, also that of a pipe
        source, corpus = config.text, None
        if (descriptor := DataConfig(source=source).descriptor) is not None:
            source = str(copy(descriptor, Path(folder), f"text {source}"))
        if source:
            corpus = open_corpus(source, field="text", say=say)
        return _measure(config, corpus, say)


def _measure(config: EvaluateConfig, corpus: Corpus | None, say: Callable[[str], None]) -> Report:
    report = Report()
    device = choose_device(config.device)
    texts: list[TextScore] = []
    models: Iterable[tuple[str, Loaded]]
    models = (
        (name, _made_longer(name, _load(name, config.weights, device, say, config.adapter), config))
        for name in config.models
    )
    context, text = config.context_length, config.text or HELD_OUT
    ids = held_out(config.models) if config.held_out else None
    if (config.paired or config.ensemble) and config.scores_text:
        models = several = list(models)
        if ids is None:
            assert corpus is not None
            ids = _same_ids(several, corpus)
        context = context or _shortest_context(several, say)
    for name, (model, tokenizer) in models:
        own = report.scores.setdefault(name, {})
        if config.scores_text:
            mine = ids
            if mine is None:
                assert corpus is not None
                mine = encode_text(tokenizer, corpus)
            stride = config.stride or config.context_length
            if config.held_out:
                stride = stride or context or model.config.context_length
            score = score_text(
                model,
                tokenizer,
                mine,
                context=context,
                stride=stride,
                batch_size=config.batch_size,
                cache=config.cache,
                keep=config.ensemble,
            )
            texts.append(score)
            own[text] = _metrics(score, config)
        for path, task in (
            (config.lambada, tasks.lambada),
            (config.hellaswag, tasks.hellaswag),
            (config.choices, tasks.multiple_choice),
        ):
            if path is not None:
                own[str(path)] = task(model, tokenizer, path, batch_size=config.batch_size)
        if config.weights == "auto":
            packed = isinstance(model, InferenceGPT)
            kind = model.weights if packed else choose_weights("auto", device)
            say(f"{name}: weights in {kind}, on {device}")
    if config.paired:
        report.difference = paired_bootstrap(*texts)
    if config.ensemble:
        report.scores[f"ensemble of {len(texts)}"] = {text: _metrics(ensemble(texts), config)}
    return report


def _metrics(score: TextScore, config: EvaluateConfig) -> dict[str, Metric]:
    """The figures of a score on a text; by position, if the length of a window was given."""
    found = {
        "nats/token": Metric(score.loss, score.standard_error),
        "perplexity": Metric(score.perplexity, score.perplexity * score.standard_error),
        "bits/byte": Metric(
            score.bits_per_byte, score.bits_per_byte * score.standard_error / score.loss
        ),
    }
    if config.context_length:
        found |= {
            f"nats/token at {first} to {last}": Metric(loss, math.nan)
            for first, last, loss in score.curve()
        }
    return found


def _same_ids(models: Sequence[tuple[str, Loaded]], corpus: Corpus) -> Ids:
    """The text's ids. ``UsageError`` if the tokenizers make different tokens of it."""
    (one, first), *others = models
    ids = encode_text(first.tokenizer, corpus)
    for name, loaded in others:
        if not np.array_equal(ids, encode_text(loaded.tokenizer, corpus)):
            raise UsageError(
                f"{foreign(one)} and {foreign(name)} make different tokens of the text; a paired "
                "comparison and an ensemble need the same tokenizer (without them, compare "
                "bits/byte)"
            )
    return ids


def _shortest_context(models: Sequence[tuple[str, Loaded]], say: Callable[[str], None]) -> int:
    """The shortest context of the models; ``say`` is told if theirs differ."""
    contexts = [loaded.model.config.context_length for _, loaded in models]
    if max(contexts) > min(contexts):
        say(
            f"all models are scored on windows of {min(contexts)} tokens, because the contexts are "
            + " and ".join(map(str, contexts))
        )
    return min(contexts)


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    scores = {
        model: {
            task: {
                name: {
                    "value": _number(metric.value),
                    "standard_error": _number(metric.standard_error),
                }
                for name, metric in metrics.items()
            }
            for task, metrics in own.items()
        }
        for model, own in report.scores.items()
    }
    content: dict[str, object] = {"scores": scores}
    if report.difference is not None:
        keys = ("nats_per_token", "low", "high")
        content["difference"] = dict(zip(keys, report.difference, strict=True))
    return json.dumps(content, indent=2) + "\n"


def _number(value: float) -> float | None:
    """``None`` for NaN (the error of a single item) and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def as_table(report: Report) -> Table:
    """The report as a table: a row for each metric, a column for each model."""
    table = Table(caption=_verdict(report), caption_justify="left")
    table.add_column("")
    for model in report.scores:
        table.add_column(Text(foreign(model)), justify="right")
    first = next(iter(report.scores.values()))
    for task, metrics in first.items():
        for name in metrics:
            row = [scores.get(task, {}).get(name) for scores in report.scores.values()]
            cells = ["" if metric is None else _cell(metric) for metric in row]
            table.add_row(Text(f"{foreign(task)}: {name}"), *cells)
    return table


def _cell(metric: Metric) -> str:
    error = f" ± {metric.standard_error:.4f}" if math.isfinite(metric.standard_error) else ""
    return f"{metric.value:.4f}{error}"


def _verdict(report: Report) -> Text | None:
    if report.difference is None:
        return None
    difference, low, high = report.difference
    one, two = map(foreign, list(report.scores)[:2])  # a third one is their ensemble
    better = (
        f"{two} is better" if low > 0 else f"{one} is better" if high < 0 else "it may be noise"
    )
    return Text(f"{difference:+.4f} nats/token, 95 % from {low:+.4f} to {high:+.4f}: {better}")
