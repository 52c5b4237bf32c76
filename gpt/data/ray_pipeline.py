"""``gpt prepare --engine ray``: the same functions as a Ray Data pipeline, on many machines.

A file of the sources is one item. A worker writes the shards of its file, named by the file's
number, into the output folder, which all machines must share; so any number of workers can write.
The documents are chosen and encoded as on one machine, and the shards in the order of the files
have the same ids. A file that was finished before a failure is not done again.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt.config import PrepareConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.compression import extra
from gpt.data.corpus import Corpus
from gpt.data.encoding import encoded
from gpt.data.pieces import SPLITS, by_content, pieces
from gpt.data.progress import Progress
from gpt.data.shard_series import ShardSeries, write_block
from gpt.files import write_atomically

PARTS = ".parts"
"""The folder of the files' summaries while they are prepared."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    corpus: Corpus
    out: Path
    fraction: float
    shard_tokens: int
    made: bytes
    """The fingerprint of the work, for the shards' headers."""

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare the file with this ``number``; the row that Ray collects has its summary."""
        number = int(row["number"])
        summary = self.out / PARTS / f"{number:05}.json"
        try:
            if not summary.exists():
                write_atomically(summary, json.dumps(self._prepare(number)))
        except UsageError as error:  # Ray would wrap it
            return {"number": number, "summary": "", "error": str(error)}
        return {"number": number, "summary": summary.read_text(encoding="utf-8"), "error": ""}

    def _prepare(self, number: int) -> dict[str, Any]:
        tokenizer = tokenizers.load(self.out / "tokenizer.json")
        fingerprint = tokenizers.fingerprint(tokenizer)
        one = dataclasses.replace(self.corpus, files=self.corpus.files[number : number + 1])
        series = {
            split: ShardSeries(
                self.out,
                f"{split}-{number:05}",
                vocab_size=tokenizer.vocab_size,
                tokenizer=fingerprint,
                corpus=self.made,
                shard_tokens=self.shard_tokens,
                state={},
            )
            for split in SPLITS
        }
        counts: Counter[str] = Counter()
        for block in encoded(pieces(one, by_content(self.fraction)), tokenizer, workers=1):
            write_block(block, series, counts)
        shards = {split: each.close() for split, each in series.items()}
        return {"counts": dict(counts), "shards": shards}


def check(config: PrepareConfig) -> None:
    """``UsageError`` for settings that need what a worker does not know."""
    if config.duplicates != "keep":
        raise UsageError(
            f"duplicates is {config.duplicates}, and the workers of engine ray do not know each "
            "other's documents; use engine local, or keep"
        )
    if config.validation == "end":
        raise UsageError(
            "validation is end, and the workers of engine ray do not know where the text ends; "
            "use engine local, or documents"
        )


def prepare_on_ray(
    config: PrepareConfig,
    corpus: Corpus,
    *,
    made: bytes,
    progress: Progress,
    show: Callable[[Progress], None],
) -> tuple[Counter[str], dict[str, list[dict[str, Any]]]]:
    """Write the shards of ``corpus`` into ``config.out``, in which the tokenizer is already, and
    return the counts and the shards of each split. It runs on the cluster that ``RAY_ADDRESS``
    names, or on a new one on this machine.

    ``UsageError`` if the package ray is missing, or for what a worker cannot read.
    """
    out = config.out
    ray = extra("ray", "--engine ray", "ray")
    data = extra("ray.data", "--engine ray", "ray")
    (out / PARTS).mkdir(exist_ok=True)
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        fraction = config.data.validation_fraction
        job = Job(corpus, out.resolve(), fraction, config.shard_tokens, made)
        items = [{"number": number} for number in range(len(corpus.files))]
        parts: dict[int, dict[str, Any]] = {}
        for row in data.from_items(items, override_num_blocks=len(items)).map(job).iter_rows():
            if row["error"]:
                raise UsageError(row["error"])
            number = row["number"]
            parts[number] = json.loads(row["summary"])
            progress.bytes += progress.before[number + 1] - progress.before[number]
            progress.tokens += parts[number]["counts"].get("tokens", 0)
            show(progress)
    finally:
        if started:
            ray.shutdown()
    counts: Counter[str] = Counter()
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for _, part in sorted(parts.items()):
        counts.update(part["counts"])
        for split, files in part["shards"].items():
            shards[split] += files
    return counts, shards
