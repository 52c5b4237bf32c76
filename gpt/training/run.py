"""A whole run: the preparation before the loop, the loop, and the report after it."""

import contextlib
import dataclasses
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gpt.config import DataConfig, TrainConfig, UsageError
from gpt.data.corpus import open_corpus
from gpt.data.instructions import Encoder, is_instructions, prepare_instructions
from gpt.data.mixture import prepare_mixture
from gpt.data.piped import is_piped, keep
from gpt.data.prepare import prepare
from gpt.data.prepared import is_corpus
from gpt.data.prompts import Records, read_prompts
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import Tokenizer
from gpt.device import choose_device
from gpt.model.gpt import GPT
from gpt.model.surgery import resize_vocabulary
from gpt.training import setup
from gpt.training.build import check_sizes
from gpt.training.curve import draw_curve
from gpt.training.loop import Data, Result, Sample, Trainer
from gpt.training.metrics import Reporter, Silent, as_settings
from gpt.training.optimizer import describe_groups
from gpt.training.parallel import World, join
from gpt.training.records import Write
from gpt.training.saving import point_and_prune
from gpt.training.tasks import FIELDS, task_of


def train(
    config: TrainConfig,
    *,
    console: Console,
    sample: Sample | None = None,
    initial: setup.Initial | None = None,
    encoder: Encoder | None = None,
    write: Write | None = None,
) -> Result:
    """Train the model that ``config`` describes, from the start or from the run's last checkpoint,
    on all processes that torchrun started. ``initial`` loads the model that ``config.init`` names.
    ``sample`` writes what is shown with each evaluation. ``encoder`` makes what encodes the records
    of instructions with a tokenizer, and ``write`` writes the texts that get rewards.

    Raises :class:`UsageError` if the run cannot be trained, and then loses nothing in its folder.
    """
    with join() as world:
        console.quiet = console.quiet or not world.is_main
        world.connect(choose_device(config.training.device))
        with contextlib.ExitStack() as stack:
            world.main_first(
                lambda: check_source(config.data, config.run)
            )  # before a folder is made
            world.broadcast(lambda: stack.enter_context(setup.held(config.run)))
            try:
                return train_on(
                    world,
                    config,
                    console=console,
                    sample=sample,
                    initial=initial,
                    encoder=encoder,
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
    write: Write | None = None,
) -> Result:
    """:func:`train` in a world, by a process that holds the run's folder."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    checkpoint = setup.checkpoint_to_resume(config.run, world, resume=config.resume, say=say)
    if checkpoint is not None:
        config = dataclasses.replace(config, data=setup.as_it_began(config.data, checkpoint))
    model: GPT | None = None
    tokenizer: Tokenizer | None = None
    wanted = config.model
    if config.init:
        if initial is None:
            raise UsageError(
                f"init is {config.init!r}, and the caller of train() gave no function to load it"
            )
        model, tokenizer = world.main_first(
            lambda: setup.take_initial_model(config.init, config.model, checkpoint, initial, say)
        )
        config = dataclasses.replace(config, model=model.config)
    with console.status("preparing the text", spinner="line") as status:
        source = world.broadcast(lambda: keep(config.data, config.cache_dir).source)
        kept = dataclasses.replace(config.data, source=source)  # a pipe's copy, for resuming
        config = dataclasses.replace(config, run_dir=str(config.run), data=kept)

        def prepared() -> Data:
            if config.objective.kind != "next_token":
                assert tokenizer is not None, "the configuration has an initial model"
                return read_prompts(config.data, tokenizer, FIELDS[config.objective.kind])
            if not config.data.mixture and is_instructions(config.data):
                assert encoder is not None, "the caller of train() gave no encoder"
                return prepare_instructions(
                    config.data, config.cache_dir, encoder, tokenizer=tokenizer
                )
            make = prepare_mixture if config.data.mixture else prepare
            return make(
                config.data,
                config.cache_dir,
                tokenizer=tokenizer,
                progress=lambda fraction: status.update(
                    Text(f"preparing {config.data.described}: {fraction:.0%}")
                ),
                say=say,
            )

        data = world.main_first(prepared)
    config = setup.resolve(config, data, checkpoint)
    device = choose_device(config.training.device)
    check_sizes(config.model, config.training, config.parallel, world, device)
    changes: list[str] = []
    if checkpoint is not None:
        now = setup.settings(config, data.train)
        changes = setup.check_changes(config.run, config.model, now, checkpoint)

    def start() -> GPT:
        assert initial is not None
        loaded, _ = setup.take_initial_model(config.init, wanted, None, initial, lambda text: None)
        resize_vocabulary(loaded, config.model.vocab_size)
        return loaded

    task = None
    if isinstance(data, Records):
        task = task_of(config, data, start=start, write=write)
    trainer = Trainer(config, data, world=world, model=model, task=task)
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
    if is_piped(data) or is_corpus(data.source) or is_token_files(data.source):
        return
    for source in [part.data.source for part in data.parts()] or [data.source]:
        folder = open_corpus(source).folder
        if folder is not None and run.exists() and folder.samefile(run):
            raise UsageError(
                f"run_dir is {run}, which is the folder of the text; choose another one, which may "
                "be inside it"
            )


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
            f"{trainer.data.tokenizer.kind} tokenizer"
        )
        steps = (
            f"training {config.training.max_steps:,} steps of {tokens:,} tokens "
            f"({f'{n} x {split}' if n > 1 else split}), "
            f"{tokens * config.training.max_steps / len(trainer.data.train):.2f} epochs"
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
