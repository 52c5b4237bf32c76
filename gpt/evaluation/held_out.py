"""The part of its text that a run has held out: what its validation loss is measured on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt.config import TOKENIZERS, TrainConfig, UsageError, foreign, parse
from gpt.data import tokenizer as tokenizers
from gpt.data.instructions import is_instructions
from gpt.data.prepare import prepare
from gpt.data.tokenizer import Ids


def held_out(runs: Sequence[str]) -> Ids:
    """The token ids that all of these runs have held out. ``UsageError`` if they are not runs on
    one text, or have held out other tokens.
    """
    first, *others = [_of_run(Path(name)) for name in runs]
    for name, ids in zip(runs[1:], others, strict=True):
        if not np.array_equal(first, ids):
            raise UsageError(
                f"{foreign(runs[0])} and {foreign(name)} have held out other tokens: held_out "
                "needs runs on one text, with one tokenizer and data.validation_fraction"
            )
    return first


def _of_run(run: Path) -> Ids:
    path = run / "config.toml"
    if not path.is_file():
        raise UsageError(
            f"held_out is the validation part of a run, and {foreign(run)} is not the folder of "
            "one: give text instead"
        )
    config = parse(TrainConfig, [str(path), "--run_dir", str(run)], prog="gpt evaluate")
    if config.objective.kind != "next_token" or config.data.mixture or is_instructions(config.data):
        raise UsageError(
            f"held_out is for runs on one text, and {foreign(run)} has records or a mixture"
        )
    given = config.init or config.data.tokenizer not in TOKENIZERS
    tokenizer = tokenizers.load(run / "tokenizer.json") if given else None
    shard = prepare(config.data, config.cache_dir, tokenizer=tokenizer).validation
    return shard.read(0, len(shard)).astype(np.uint32)
