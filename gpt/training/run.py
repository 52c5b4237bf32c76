"""A whole run: the preparation before the loop, the loop, and the report after it."""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from gpt.config import TOKENIZERS, DataConfig, RoundedBase, TrainConfig, UsageError, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import open_corpus
from gpt.data.instructions import Encoder, is_instructions, prepare_instructions
from gpt.data.mixture import prepare_mixture
from gpt.data.piped import is_piped, keep
from gpt.data.prepare import prepare
from gpt.data.prepared import is_corpus
from gpt.data.prompts import Records, read_prompts
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import Tokenizer, name_of
from gpt.data.word_vectors import fill_embedding
from gpt.device import choose_device
from gpt.model.gpt import GPT
from gpt.model.surgery import resize_vocabulary
from gpt.training import budget, setup
from gpt.training.build import check_sizes
from gpt.training.curve import draw_curve
from gpt.training.distillation import load_teachers
from gpt.training.loop import Data, Result, Sample, Trainer
from gpt.training.metrics import Reporter, Silent, as_settings
from gpt.training.optimizer import describe_groups
from gpt.training.parallel import World, join
from gpt.training.records import Write
from gpt.training.saving import point_and_prune
from gpt.training.tasks import FIELDS, task_of

Named = Callable[[str], Tokenizer]
"""Loads a tokenizer by its name: a file, a folder, or an encoding of tiktoken."""


def train(
    config: TrainConfig,
    *,
    console: Console,
    sample: Sample | None = None,
    initial: setup.Initial | None = None,
    encoder: Encoder | None = None,
    named: Named | None = None,
    freeze_rounded: Callable[[GPT, RoundedBase], None] | None = None,
    write: Write | None = None,
) -> Result:
    """Train the model that ``config`` describes, from the start or from the run's last checkpoint,
    on all processes that torchrun started. ``initial`` loads the model that ``config.init`` names.
    ``sample`` writes what is shown with each evaluation. ``encoder`` makes what encodes the records
    of instructions with a tokenizer. ``named`` loads a tokenizer that ``config.data.tokenizer``
    names and that is not made from the text. ``freeze_rounded`` rounds the weights under an
    adapter. ``write`` writes the texts that get rewards.

    Raises :class:`UsageError` if the run cannot be trained, and then loses nothing in its folder.
    """
    with join() as world:
        console.quiet = console.quiet or not world.is_main
        world.connect(choose_device(config.training.device))
        with contextlib.ExitStack() as stack:
            world.main_first(
                lambda: check_source(config.data, config.run)
            )  # before a folder is made
            tokenizer = world.main_first(lambda: given_tokenizer(config, named))
            world.broadcast(lambda: stack.enter_context(setup.held(config.run)))
            try:
                return train_on(
                    world,
                    config,
                    console=console,
                    sample=sample,
                    initial=initial,
                    encoder=encoder,
                    tokenizer=tokenizer,
                    freeze_rounded=freeze_rounded,
                    write=write,
                )
            except OSError as error:
                if error.errno not in setup.DISK_ERRORS:
                    raise
                raise UsageError(
                    f"{error.filename or config.run} cannot be read or written: {error.strerror}; "
                    f"the checkpoints of {config.run} are complete, and --resume continues from "
                    "the newest one"
                ) from error


def train_on(
    world: World,
    config: TrainConfig,
    *,
    console: Console,
    sample: Sample | None = None,
    initial: setup.Initial | None = None,
    encoder: Encoder | None = None,
    tokenizer: Tokenizer | None = None,
    freeze_rounded: Callable[[GPT, RoundedBase], None] | None = None,
    write: Write | None = None,
) -> Result:
    """:func:`train` in a world, by a process that holds the run's folder. ``tokenizer`` replaces
    the one that ``config.data.tokenizer`` names.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    checkpoint = setup.checkpoint_to_resume(config.run, world, resume=config.resume, say=say)
    if checkpoint is not None:
        config = dataclasses.replace(config, data=setup.as_it_began(config.data, checkpoint))
    model: GPT | None = None
    base: dict[str, Any] = {}
    has_adapter = config.adapter.kind != "none"
    wanted = config.model
    if config.init:
        if initial is None:
            raise UsageError(
                f"init is {config.init!r}, and the caller of train() gave no function to load it"
            )
        model, tokenizer = world.main_first(
            lambda: setup.take_initial_model(
                config.init,
                config.model,
                None if has_adapter else checkpoint,  # which has only the adapter
                initial,
                say,
            )
        )
        if has_adapter:
            base = setup.describe_base(config, model)
            if checkpoint is not None:
                setup.check_base(checkpoint, config.init, model)
            if config.adapter.base in ("bfloat16", "int8", "int4"):
                if freeze_rounded is None:
                    raise UsageError(
                        f"adapter.base is {config.adapter.base}, and the caller of train() gave no "
                        "function to round the weights"
                    )
                freeze_rounded(model, config.adapter.base)
        config = dataclasses.replace(config, model=model.config)
    with console.status("preparing the text", spinner="line") as status:
        source = world.broadcast(lambda: keep(config.data, config.cache_dir).source)
        kept = dataclasses.replace(config.data, source=source)  # a pipe's copy, for resuming
        config = dataclasses.replace(config, run_dir=str(config.run), data=kept)

        def show(fraction: float) -> None:
            status.update(Text(f"preparing {config.data.described}: {fraction:.0%}"))

        def prepared() -> Data:
            if config.objective.kind != "next_token":
                assert tokenizer is not None, "the configuration has an initial model"
                return read_prompts(config.data, tokenizer, FIELDS[config.objective.kind])
            if not config.data.mixture and is_instructions(config.data):
                assert encoder is not None, "the caller of train() gave no encoder"
                return prepare_instructions(
                    config.data, config.cache_dir, encoder, tokenizer=tokenizer
                )
            if config.data.mixture:
                return prepare_mixture(
                    config.data,
                    config.cache_dir,
                    tokenizer=tokenizer,
                    encoder=encoder,
                    progress=show,
                    say=say,
                )
            return prepare(
                config.data, config.cache_dir, tokenizer=tokenizer, progress=show, say=say
            )

        data = world.main_first(prepared)
    config = setup.resolve(config, data, checkpoint)
    if checkpoint is not None and config.training.max_minutes:
        config = setup.as_it_was_planned(config, checkpoint, say)
    device = choose_device(config.training.device)
    check_sizes(config.model, config.training, config.parallel, world, device, config.adapter)
    changes: list[str] = []
    if checkpoint is not None:
        now = setup.settings(config, data.train)
        changes = setup.check_changes(config.run, config.model, now, checkpoint)
    if config.embeddings and checkpoint is None:
        if model is None:
            torch.manual_seed(config.training.seed)  # the weights that the trainer would draw
            model = GPT(config.model)
        fill_embedding(
            model.embed.weight.detach(), Path(config.embeddings), data.tokenizer, say=say
        )

    def start() -> GPT:
        assert initial is not None
        loaded, _ = setup.take_initial_model(config.init, wanted, None, initial, lambda text: None)
        resize_vocabulary(loaded, config.model.vocab_size)
        return loaded

    teachers: list[GPT] = []
    if config.objective.distill:
        if initial is None:
            raise UsageError(
                f"objective.distill is {config.objective.distill!r}, and the caller of train() "
                "gave no function to load it"
            )
        teachers = world.main_first(lambda: load_teachers(config, data.tokenizer, initial))
    if config.training.max_minutes:  # not of a run that is resumed
        config = budget.plan(
            config, data, world=world, model=model, teachers=teachers, sample=sample, say=say
        )
    task = None
    if isinstance(data, Records):
        task = task_of(config, data, start=start, write=write)
    trainer = Trainer(
        config, data, world=world, model=model, task=task, base=base, teachers=teachers
    )
    if checkpoint is not None:
        changes += trainer.resume(checkpoint)
    if world.is_main:
        setup.write_run_files(config, data.tokenizer)
        if checkpoint is not None:
            name, best = checkpoint.path.name, trainer.best
            point_and_prune(config.run, config.checkpoint, last=name, best=best, say=say)
    for line in (*trainer.notes, *(f"changed  {text}" for text in changes), *beginning(trainer)):
        say(line)
    reporter: Reporter | Silent = Silent()
    if world.is_main:
        reporter = Reporter(
            config.run,
            config.log,
            console=console,
            first_step=trainer.step,
            max_steps=config.training.max_steps,
            settings=as_settings(config),
        )
    with reporter:
        result = trainer.run(reporter, sample)
        for line in ending(trainer):
            reporter.say(line)
    if result.signal is not None:
        say(
            f"stopped at step {result.step:,}, which is saved; continue with: "
            f"python train.py {shlex.quote(str(config.run / 'config.toml'))} --resume"
        )
    elif world.is_main:
        ascii_only = console.options.ascii_only
        say(draw_curve(config.run / "metrics.jsonl", ascii_only=ascii_only))
    return result


def check_source(data: DataConfig, run: Path) -> None:
    """``UsageError`` if the text does not exist, or the run's folder is the folder of the text."""
    if is_piped(data):
        return
    for source in [part.data.source for part in data.parts()] or [data.source]:
        if is_corpus(source) or is_token_files(source):
            continue
        folder = open_corpus(source).folder
        if folder is not None and run.exists() and folder.samefile(run):
            raise UsageError(
                f"run_dir is {run}, which is the folder of the text; choose another one, which may "
                "be inside it"
            )


def given_tokenizer(config: TrainConfig, named: Named | None) -> Tokenizer | None:
    """The tokenizer that ``config.data.tokenizer`` names, or ``None`` if the text, GPT-2 or an
    initial model has it. A run that is resumed uses the one in its folder.
    """
    name, own = config.data.tokenizer, config.run / "tokenizer.json"
    if name in TOKENIZERS or config.init:
        return None
    if config.resume and own.is_file():
        return tokenizers.load(own)
    if named is None:
        raise UsageError(
            f"data.tokenizer is {quoted(name)}, and the caller of train() gave no function to load "
            "it"
        )
    return named(name)


def beginning(trainer: Trainer) -> list[str]:
    """A summary of the run in a few lines, for the user."""
    config, model = trainer.config, trainer.config.model
    tokens, n = config.training.batch_tokens, trainer.world.size
    sequences = trainer.source.sequences // n
    micro = min(config.training.micro_batch_size, sequences)
    split = f"{-(-sequences // micro)} x {micro} x {model.context_length}"
    processes = f"{trainer.strategy} on {n} processes, " if n > 1 else ""
    network = (
        f"model    {trainer.model.parameter_count():,} parameters "
        f"({trainer.model.parameter_count(embeddings=False):,} without embeddings): "
        f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
        f"context {model.context_length}"
    )
    place = f"{processes}{trainer.device.type}, {str(trainer.dtype).removeprefix('torch.')}"
    if trainer.task is not None:
        text, steps, *more = trainer.task.describe()
    else:
        text = (
            f"text     {config.data.described}: {len(trainer.data.train):,} training and "
            f"{len(trainer.data.validation):,} validation tokens, "
            f"{name_of(trainer.data.tokenizer)} tokenizer"
        )
        steps = (
            f"training {config.training.max_steps:,} steps of {tokens:,} tokens "
            f"({f'{n} x {split}' if n > 1 else split}), "
            f"{trainer.source.progress(config.training.max_steps)['epoch']:.2f} epochs"
        )
        more = trainer.source.describe()
    return [
        f"run      {config.run}"
        + (f", continuing from step {trainer.step:,}" if trainer.step else ""),
        text,
        network,
        f"{steps}, {place}",
        *more,
        *describe_groups(trainer.optimizers),
    ]


def ending(trainer: Trainer) -> list[str]:
    """A summary of the run's time in a few lines, for the user."""
    lines = trainer.stopwatch.summary()
    if trainer.stalls:
        mean = 1000 * sum(trainer.stalls) / len(trainer.stalls)
        lines.append(
            f"a checkpoint ({len(trainer.stalls)} in all) stopped the run for {mean:.0f} ms"
        )
    return lines
