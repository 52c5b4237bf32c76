"""The work of the processes in tests/training/test_parallel.py: ``python worker.py FOLDER``.

A single process does it first, and its results are the reference. Then this process, which has
imported all there is to import, forks the worlds of two and four. ``--all`` adds what the slow
tests need.
"""

import dataclasses
import io
import os
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing
from rich.console import Console
from torch.distributed.tensor import DTensor

from gpt.config import AdapterConfig, CheckpointConfig, OptimizerConfig, TrainConfig
from gpt.data.batches import IGNORED, Batch, TextWindows
from gpt.data.instructions import prepare_instructions
from gpt.data.prepare import prepare
from gpt.generation.examples import ExampleEncoder
from gpt.generation.frozen import freeze_rounded
from gpt.model.adapter import adapter_weights
from gpt.model.gpt import GPT
from gpt.training.loop import Shown, Trainer
from gpt.training.parallel import World, join
from gpt.training.run import train_on
from tests.tiny import change, tiny_run

MICRO = {1: (1, 2, 4, 8), 2: (1, 2, 4), 4: (1, 2)}
"""Micro batch sizes, up to a process's whole share of 8 windows."""
COMPOSITES = {
    "rotary": {
        "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu",
        "n_kv_head": 1, "qk_norm": True, "bias": False, "tie_embeddings": False,
        "window": 5, "window_pattern": "LG",
    },
    "sandwich": {
        "position": "alibi", "norm_placement": "sandwich", "scale_embeddings": True,
        "embedding_norm": True, "learned_sinks": True, "attention_softcap": 5.0,
        "logit_softcap": 7.0, "window_pattern": "S", "sparse_block": 3,
    },
    "experts": {
        "position": "xpos", "norm_placement": "deepnorm", "n_expert": 4, "n_expert_active": 2,
        "moe_shared": 1, "moe_balance": "bias", "copy": "pointer",
    },
}  # fmt: skip
"""Models of many techniques at once."""
KINDS = (
    "dpo", "reward", "reward, several updates", "reward, divergence in it", "dpo of an adapter",
    "reward of an adapter",
)  # fmt: skip
"""Objectives of tests/training/tasks.py."""
RESUMED = ("dpo", "reward, several updates", "reward of an adapter")
"""Those that two processes resume."""
ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=3),
    "bottleneck": AdapterConfig(kind="bottleneck", rank=3),
    "over int4": AdapterConfig(kind="lora", rank=3, base="int4"),
}
FORMATS = {"fsdp": ("full", "sharded"), "hybrid": ("full", "sharded")}
MADE = ("single-1-full", "fsdp-2-full", "fsdp-2-sharded", "hybrid-4-sharded")
"""Runs that are resumed by other numbers of processes."""
USUAL = {
    "single-1-full": ("ddp-2", "fsdp-2", "hybrid-4"),
    "fsdp-2-full": ("ddp-4",),
    "fsdp-2-sharded": ("fsdp-4",),
}
"""Where they are resumed without ``--all``: each of the five once."""
N_USUAL = 50
"""The models of the family without ``--all``: the first ones bring the most pairs."""


def family(strategy: str, *, all_rows: bool = True) -> dict[str, dict[str, object]]:
    """Models in which every two techniques meet: every other one for each strategy. Not
    ``all_rows``: the first, in which each technique still meets each strategy, and two thirds of
    the pairs are.
    """
    from tests.model.family import PARTS, ROWS, id_of

    rows = ROWS if all_rows else ROWS[:N_USUAL]
    chosen = {"single": rows, "ddp": rows[::2], "fsdp": rows[1::2]}[strategy]
    models = {}
    for row in chosen:
        models[id_of(row)] = model = {"n_head": 4, "n_inner": 48}
        for part, name in row.items():
            model |= PARTS[part][name]
    return models


def config_of(
    folder: Path, run: str, *, strategy="auto", n_shards=0, training=(), model=(), **more
) -> TrainConfig:
    config = tiny_run(
        folder,
        folder / "text.txt",
        data={"cache_dir": str(folder / "data")},
        training={"max_steps": 6, "micro_batch_size": 2} | dict(training),
        model=dict(model),
        evaluation={"every": 3, "windows": 7, "sample_tokens": 0},
        checkpoint={"keep": 9},
        parallel={"strategy": strategy, "shard_size": n_shards},
        log={"every": 1},
    )
    return dataclasses.replace(config, run_dir=str(folder / run), **more)


def run_of(folder: Path, run: str, **options) -> TrainConfig:
    """A run of six steps, of which the last four are averaged."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, cautious_decay=True)
    training = {"average_fraction": 0.7, "average_decay": 0.6}
    return config_of(folder, run, training=training, optimizer=optimizer, **options)


def trainer_of(config: TrainConfig, world: World, teachers=()) -> Trainer:
    data = world.main_first(lambda: prepare(config.data, config.cache_dir))
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    if config.adapter.kind == "none":
        models = []
        for seed in teachers:
            torch.manual_seed(seed)
            models.append(GPT(model))
        return Trainer(config, data, world=world, teachers=models)
    torch.manual_seed(3)
    base = GPT(model)
    if config.adapter.base == "int4":
        freeze_rounded(base, "int4")
    trainer = Trainer(config, data, world=world, model=base)
    with torch.no_grad():
        for parameter in adapter_weights(trainer.model).values():
            parameter.add_(0.05)  # a new one has gradients of 0
    return trainer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in trainer.model.named_parameters()}


def gradients(config: TrainConfig, world: World, teachers=()) -> dict[str, torch.Tensor]:
    return gradients_of(trainer_of(config, world, teachers))


def gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    loss, norm, _ = trainer.gradients()
    named = trainer.model.named_parameters()
    found = {name: whole(p.grad) for name, p in named if p.requires_grad}
    return {"loss": torch.tensor(loss), "norm": torch.tensor(norm), **found}


class Masked(TextWindows):
    """Windows with different masked targets in each: 0 to 15 of the 16."""

    def batch(self, windows):
        batch = super().batch(windows)
        rows = torch.tensor([int(w) * 7 % 16 for w in windows])
        hidden = torch.arange(16) < rows[:, None]
        return Batch(batch.tokens, batch.targets.masked_fill(hidden, IGNORED))


def objective_gradients(folder: Path, kind: str, world: World, options: dict) -> dict:
    """The gradients after one step of an objective on records, and the texts that it wrote."""
    from tests.training import tasks

    config = tasks.config_of(folder, kind, parallel={"strategy": options.get("strategy", "auto")})
    trainer = tasks.trainer_of(config, world)
    trainer.update()
    numbers = gradients_of(trainer)
    written = getattr(trainer.task, "_round", None)
    figures = trainer.task.figures.take() | trainer.task.evaluate().figures
    return {"gradients": numbers, "texts": written and written.tokens, "figures": figures}


def resumes(folder: Path, kind: str, world: World, strategy: str) -> bool:
    """Whether a run that is resumed ends as the uninterrupted one, bit for bit."""
    from tests.training import tasks

    ends = []
    for name in ("whole", "stopped"):
        parallel = {"strategy": strategy}
        config = tasks.config_of(
            folder, kind, checkpoint={"every": 2, "keep": 9}, parallel=parallel
        )
        config = dataclasses.replace(config, run_dir=str(folder / f"{kind}-{strategy}-{name}"))
        tasks.run(config, world)
        if name == "stopped":
            if world.is_main:
                for step in ("step-00000006", "step-00000007"):
                    (config.run / "checkpoints" / step / "meta.json").unlink()
            world.wait_for_all()
            tasks.run(dataclasses.replace(config, resume=True), world)
        world.wait_for_all()
        ends.append(tasks.weights(config))
    whole, stopped = ends
    return all(torch.equal(whole[name], stopped[name]) for name in whole)


def instructions_gradients(folder: Path, world: World, options: dict) -> dict:
    """The gradients of a step on packed instructions, whose windows have unlike answers."""
    config = config_of(folder, "none", **options)
    config = change(config, data={"source": str(folder / "sums.jsonl")})

    def prepared():
        return prepare_instructions(config.data, config.cache_dir, ExampleEncoder)

    data = world.main_first(prepared)
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    return gradients_of(Trainer(dataclasses.replace(config, model=model), data, world=world))


def scheduled_gradients(folder: Path, world: World, options: dict) -> dict:
    """The gradients of a step with scheduled sampling."""
    training = {"scheduled_sampling": 0.5, "scheduled_sampling_schedule": "constant"}
    return gradients(config_of(folder, "none", **options, training=training), world)


def train(config: TrainConfig, world: World, sample=None) -> str:
    console = Console(file=io.StringIO(), width=300)
    train_on(world, config, console=console, sample=sample)
    return console.file.getvalue()


class Several(TextWindows):
    """Windows with two documents each, of unlike lengths."""

    def batch(self, windows):
        batch = super().batch(windows)
        at = torch.arange(batch.tokens.shape[1])
        documents = (at >= torch.from_numpy(windows % 11 + 2)[:, None]).long()
        return Batch(batch.tokens, batch.targets, documents)


def main(folder: Path, everything: bool) -> None:
    torch.set_num_threads(1)
    results = {}
    with join() as world:
        world.connect(torch.device("cpu"))
        n = world.size
        strategies = {"single": {}} if n == 1 else {"ddp": {}, "fsdp": {}}
        if n == 4:
            strategies["hybrid"] = {"strategy": "fsdp", "n_shards": 2}
        for name, options in strategies.items():
            options = {"strategy": name} | options if n > 1 else {}
            for micro in MICRO[n]:
                training = {"micro_batch_size": micro, "gradient_clip": 0.0}
                config = config_of(folder, "none", **options, training=training)
                results[name, "gradients", micro] = gradients(config, world)
                few = {"MIN_POSITIONS_PER_FEATURE": 0, "MULTIPLE": 4, "LOGITS": {"cpu": 1}}
                with mock.patch.multiple("gpt.training.loss", **few):
                    results[name, "head in chunks", micro] = gradients(config, world)
                for kind, windows in {"masked": Masked, "documents": Several}.items():
                    with mock.patch("gpt.data.prepared.TextWindows", windows):
                        results[name, kind, micro] = gradients(config, world)
            for kind, model in COMPOSITES.items():
                config = config_of(folder, "none", **options, model=model)
                results[name, kind] = gradients(config, world)
            for kind, adapter in ADAPTERS.items():
                if kind == "over int4" and name in ("fsdp", "hybrid"):
                    continue  # which cannot shard it
                config = config_of(folder, "none", **options, init="base", adapter=adapter)
                results[name, kind] = gradients(config, world)
            training = {"freeze": ("embed.*", "blocks.0.*")}
            config = config_of(folder, "none", **options, training=training)
            results[name, "frozen"] = gradients(config, world)
            rates = OptimizerConfig(warmup_steps=2, rates=("embed.*=0.1", "blocks.*=2"))
            trainer = trainer_of(config_of(folder, "none", **options, optimizer=rates), world)
            results[name, "rates"] = torch.tensor([trainer.update()[0] for _ in range(4)])
            for kind, model in family(name, all_rows=everything).items() if n < 4 else ():
                training = {"micro_batch_size": 4}
                config = config_of(folder, "none", **options, model=model, training=training)
                results[name, kind] = gradients(config, world)
            if n < 4:
                results[name, "instructions"] = instructions_gradients(folder, world, options)
                results[name, "scheduled"] = scheduled_gradients(folder, world, options)
                config = config_of(folder, "none", **options)
                results[name, "distilled"] = gradients(config, world, teachers=(5, 6))
                for kind in KINDS:
                    results[name, kind] = objective_gradients(folder, kind, world, options)
            for kind in RESUMED if n == 2 else ():
                results[name, "again", kind] = resumes(folder, kind, world, name)
            config = config_of(folder, "none", **options)
            results[name, "new"] = weights(trainer_of(config, world))
            for kind in ("selective", "full"):
                training = {"activation_checkpointing": kind, "gradient_clip": 0.0}
                config = config_of(folder, "none", **options, training=training)
                results[name, kind] = gradients(config, world)
            for precision in ("bfloat16", "float16"):
                config = config_of(folder, "none", **options, training={"precision": precision})
                trainer = trainer_of(config, world)
                losses = [trainer.update()[0] for _ in range(4)]
                if precision == "float16":
                    trainer.scaler._scale.fill_(2.0**30)  # too high
                    before = weights(trainer)
                    trainer.update()
                    after = weights(trainer)
                    same = all(torch.equal(before[k], after[k]) for k in before)
                    results[name, "overflow"] = (same, trainer.scaler.get_scale())
                results[name, precision] = torch.tensor(losses)
            muon = OptimizerConfig(name="muon", warmup_steps=2)
            trainer = trainer_of(config_of(folder, "none", **options, optimizer=muon), world)
            results[name, "muon"] = torch.tensor([trainer.update()[0] for _ in range(4)])
            for kind in FORMATS.get(name, ("full",)):
                run = f"{name}-{n}-{kind}"
                options["checkpoint"] = CheckpointConfig(keep=9, format=kind)
                texts = []

                def sample(model, data, texts=texts):
                    texts.append(type(model).__name__)
                    return Shown("a sample")

                results[name, kind, "said"] = train(run_of(folder, run, **options), world, sample)
                results[name, kind, "samples"] = len(texts)
            # resume runs of other numbers of processes
            for made in MADE:
                there = (folder / made / "last").exists() and not made.startswith(f"{name}-{n}")
                if there and (everything or f"{name}-{n}" in USUAL.get(made, ())):
                    run = f"{made}-on-{name}-{n}"
                    if world.is_main:
                        copy_at_step_3(folder / made, folder / run)
                    config = run_of(folder, run, **options, resume=True)
                    results[name, "resumed", made] = train(config, world)
        results["largest"] = world.largest(world.rank)
        world.wait_for_all()
        if n > 1:
            gloo = world._patient._get_backend(torch.device("cpu"))
            results["patience"] = gloo.options._timeout
        if world.is_main:
            torch.save(results, folder / f"{n}.pt")


def copy_at_step_3(made: Path, run: Path) -> None:
    shutil.copytree(made, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")


def of_rank(rank: int, size: int, port: int, *words: Any) -> None:
    """The work of a process in the environment that torchrun would give it."""
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in there.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    main(*words)


if __name__ == "__main__":
    warnings.simplefilter("error")
    words = Path(sys.argv[1]), "--all" in sys.argv
    main(*words)
    for n in (2, 4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(of_rank, (n, port, *words), n, start_method="fork")
