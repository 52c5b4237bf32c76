"""What stands before the first step: which checkpoint to go on from, and the run's folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint
from gpt.config import ModelConfig, TrainConfig, UsageError, to_toml
from gpt.data import tokenizer as tokenizers
from gpt.data.prepare import Prepared
from gpt.data.shards import Shard
from gpt.data.tokenizer import Tokenizer
from gpt.interop.load import Loaded, load


def checkpoint_to_resume(config: TrainConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """The run's newest checkpoint if it is to be resumed; refuses to start over one that is
    there.
    """
    checkpoint = checkpoints.find(config.run, "last", say=say) if config.run.exists() else None
    if not config.resume:
        if checkpoint is not None:
            raise UsageError(
                f"{config.run} holds a run at step {checkpoint.step:,} already: --resume goes on "
                "with it, --run_dir starts another one elsewhere"
            )
        return None
    if checkpoint is None:
        say(f"{config.run} has no checkpoint to resume from; starting at step 0")
    return checkpoint


def take_initial_model(
    config: TrainConfig, checkpoint: Checkpoint | None, say: Callable[[str], None]
) -> tuple[TrainConfig, Loaded | None]:
    """The model that ``config.init`` names, made to fit, and the configuration with its shape."""
    if not config.init:
        return config, None
    loaded = load(checkpoint.path if checkpoint else config.init, trainable=True, say=say)
    model, wanted = loaded.model, config.model
    if wanted.context_length < model.config.context_length:
        model.crop_context(wanted.context_length)
    if wanted.vocab_size > model.config.vocab_size:
        model.resize_vocabulary(wanted.vocab_size)
    model.set_dropout(wanted.dropout)
    for parameter in model.parameters():  # memory of its own, laid out as a new model's
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return dataclasses.replace(config, model=model.config), loaded


def resolve(config: TrainConfig, data: Prepared, checkpoint: Checkpoint | None) -> TrainConfig:
    """The configuration with every field known; ``UsageError`` if it does not fit the
    checkpoint.
    """
    tokenizer = data.tokenizer
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"model.vocab_size is {vocab_size}, and the {tokenizer.kind} tokenizer of "
            f"{config.data.source} needs {tokenizer.vocab_size} (0 takes that)"
        )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    config = dataclasses.replace(config, run_dir=str(config.run), resume=False, model=model)
    if checkpoint is not None:
        _check_same_model(config.run, checkpoint.model, model)
        if tokenizers.fingerprint(tokenizers.load(config.run / "tokenizer.json")) != (
            tokenizers.fingerprint(tokenizer)
        ):
            raise UsageError(
                f"{config.run} was trained with another tokenizer than {config.data.source} "
                "has now: resume with the text and data.tokenizer that it was started with"
            )
    return config


def write_run_files(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Write the resolved configuration and the tokenizer into the run's folder."""
    config.run.mkdir(parents=True, exist_ok=True)
    checkpoints.write_atomically(config.run / "tokenizer.json", tokenizers.to_json(tokenizer))
    checkpoints.write_atomically(config.run / "config.toml", to_toml(config))


def identity(config: TrainConfig, text: Shard) -> dict[str, str]:
    """What makes a resumed run the same run: its text, the order of it, and its optimizer."""
    return {
        "the text of fingerprint": text.corpus.hex()[:12],
        "training.seed": str(config.training.seed),
        "training.batch_tokens": str(config.training.batch_tokens),
        "optimizer.name": config.optimizer.name,
    }


def _check_same_model(run: Path, saved: ModelConfig, wanted: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if old != new and field.name != "dropout":
            raise UsageError(
                f"{run} was trained with model.{field.name} {old}, and cannot be resumed with {new}"
            )
