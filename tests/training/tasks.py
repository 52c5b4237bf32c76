"""Tiny runs of the tasks on records."""

import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.checkpoint import State
from gpt.config import AdapterConfig, ModelConfig, ObjectiveConfig, TrainConfig
from gpt.data.prompts import read_prompts
from gpt.data.tokenizer import ByteTokenizer, to_json
from gpt.generation.rollout import write_texts
from gpt.interop.load import load
from gpt.model.gpt import GPT
from gpt.training.loop import Trainer
from gpt.training.parallel import World
from gpt.training.run import train, train_on
from gpt.training.tasks import FIELDS, task_of
from tests.tiny import tiny_run

MODEL = {"vocab_size": 257, "context_length": 24, "n_layer": 1, "n_head": 2, "n_embd": 16}
KINDS = {
    "dpo": {"kind": "dpo", "beta": 0.5},
    "reward": {"kind": "reward", "reward": "length", "length": 5},
    "reward, several updates": {
        "kind": "reward", "reward": "length", "length": 5, "updates": 3, "baseline": "group",
        "by_length": True, "kl": 0.1,
    },
    "reward, divergence in it": {
        "kind": "reward", "reward": "length", "length": 5, "kl": 0.1, "kl_in": "reward",
    },
    "dpo of an adapter": {"kind": "dpo", "beta": 0.5},
    "reward of an adapter": {"kind": "reward", "reward": "length", "length": 5, "kl": 0.1},
}  # fmt: skip
"""Objectives of every kind."""


def write_records(path: Path, n: int = 24) -> Path:
    """Records for all objectives."""
    records = (
        {"prompt": f"{i}+{i % 5}=", "chosen": "yes" * (1 + i % 3), "rejected": "no" * (1 + i % 2)}
        for i in range(n)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config_of(folder: Path, kind: str, objective=(), training=(), evaluation=(), **groups):
    """A run of 7 steps, in ``folder/run``, from ``folder/start``, on ``folder/records.jsonl``."""
    adapter = AdapterConfig(kind="lora", rank=2) if "adapter" in kind else AdapterConfig()
    fields = {"records": 4, "samples": 3, "max_new_tokens": 6} | KINDS[kind] | dict(objective)
    config = tiny_run(
        folder,
        folder / "records.jsonl",
        data={"validation_fraction": 0.2},
        evaluation={"every": 20, "windows": 3, "sample_tokens": 4} | dict(evaluation),
        **groups,
    )
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **{"max_steps": 7} | dict(training)),
        init=str(folder / "start"),
        model=ModelConfig(vocab_size=0, context_length=0),
        objective=ObjectiveConfig(**fields),
        adapter=adapter,
    )


def make_start(folder: Path) -> None:
    """Write the start model of :func:`config_of`."""
    config = TrainConfig(init="", run_dir=str(folder / "start"))
    model = start_of(config)
    state = State(
        step=1,
        model=model.config,
        weights=dict(model.named_parameters()),
        training={},
        progress={},
        metrics={},
    )
    checkpoints.save(config.run, state)
    (config.run / "tokenizer.json").write_text(to_json(ByteTokenizer()))


def start_of(config: TrainConfig) -> GPT:
    """A new tiny model."""
    torch.manual_seed(0)
    return GPT(ModelConfig(**MODEL))


def trainer_of(
    config: TrainConfig, world: World | None = None, model: GPT | None = None
) -> Trainer:
    """A trainer of a new tiny model, without a run around it."""
    data = read_prompts(config.data, ByteTokenizer(), FIELDS[config.objective.kind])
    model = model or start_of(config)
    config = dataclasses.replace(config, model=model.config)
    task = task_of(config, data, start=lambda: start_of(config), write=write_texts)
    return Trainer(config, data, world=world, model=model, task=task)


def run(config: TrainConfig, world: World | None = None) -> str:
    """Train, perhaps as one process of a world, and return what was printed."""
    console = Console(file=io.StringIO(), width=200)
    starts = {"initial": partial(load, trainable=True), "write": write_texts}
    if world is None:
        train(config, console=console, **starts)
    else:
        train_on(world, config, console=console, **starts)
    return console.file.getvalue()


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Those of the run's last checkpoint."""
    found = checkpoints.find(config.run, "last")
    assert found is not None
    return tensors.load(found.path / checkpoints.MODEL)
