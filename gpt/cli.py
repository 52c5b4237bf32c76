"""The command line: ``gpt COMMAND``, of which ``gpt --help`` prints a list.

``train.py`` and ``sample.py`` run the first two.

Each command imports the large modules only after it has parsed its options, so ``--help`` and a
misspelt option answer at once. A user's mistake prints one sentence and exits with status 2; with
``GPT_TRACEBACK=1`` in the environment, it prints Python's traceback.
"""

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from gpt.commands.serve import serve
from gpt.config import (
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    PlanConfig,
    PrepareConfig,
    ReportConfig,
    SampleConfig,
    TrainConfig,
    UsageError,
    foreign,
    nearest,
    parse,
    parse_training,
    unescaped,
)
from gpt.console import open_console, tell
from gpt.files import as_training_text, check_output, read_text, sentence, unreadable

if TYPE_CHECKING:
    from gpt.config import ModelConfig
    from gpt.data.tokenizer import Tokenizer
    from gpt.model.gpt import GPT
    from gpt.training.loop import Data, Shown
    from gpt.training.records import Write

_CONFIGS = [here / "configs" for here in Path(__file__).resolve().parents[:2]]
"""The folder is in an installed package, and beside the package in a checkout."""
CONFIGS = next(filter(Path.is_dir, _CONFIGS), _CONFIGS[0])
SAMPLE_SEED = 0
"""Seed of the samples during training: they differ only by what the model has learned."""
SHOWN_ANSWERS = 3
"""Of those to held-out questions, how many an evaluation shows."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "gpt") -> int:
    """Run a command, and return the exit status: 0; 1 if the reader of the output has gone; 2 after
    an error with a message (a mistake of the user, a full disk, a run that diverged); 130 after
    Ctrl-C; 143 after SIGTERM. During the imports Ctrl-C ends the process by its signal.
    """
    _ready_streams()
    command, *words = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    try:
        try:
            return _run(command, words, prog)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the pipe has gone
        return 1
    except (UsageError, OSError) as error:
        if os.environ.get("GPT_TRACEBACK"):
            raise
        nameless = isinstance(error, OSError) and error.filename is None
        where = "standard output: " if nameless and not _can_write(sys.stdout) else ""
        tell(f"{prog}: {where}{sentence(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("GPT_TRACEBACK") or not _is_out_of_memory(error):
            raise
        tell(f"{prog}: not enough memory; {_NEEDS_LESS.get(command, foreign(error))}")
        return 2
    finally:
        for stream in (sys.stdout, sys.stderr):
            _can_write(stream)


def _run(command: str, words: Sequence[str], prog: str) -> int:
    if command in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if command == "--print-completion" or command.startswith("--print-completion="):
        from gpt.commands.completion import script

        given = command.partition("=")[2] or (words[0] if words else "")
        sys.stdout.write(script(given))
        return 0
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UsageError(
            f"unknown command {foreign(repr(command))}; choose from {known}"
            f"{nearest(command, COMMANDS)}"
        )
    return COMMANDS[command](words, f"{prog} {command}" if prog == "gpt" else prog)


_NEEDS_LESS = {
    "train": "try a smaller training.micro_batch_size, training.activation_checkpointing full, or "
    "a smaller model.context_length",
    "sample": "try a smaller --batch_size, --weights int8 or int4, or fewer --max_new_tokens",
    "evaluate": "try a smaller --batch_size, --weights int8 or int4, or --device cpu",
    "serve": "try --weights int8 or int4, or a smaller --batch_size or --max_length",
}


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is for CUDA only; the CPU allocator's error has no type of its own
    said = r"out of memory|can't allocate memory|not enough memory|bad_alloc"
    return isinstance(error, MemoryError) or re.search(said, str(error)) is not None


def _ready_streams() -> None:
    """Make sure that output never ends a run: characters that the encoding lacks are escaped, and
    closed streams become the null device.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
                if nowhere != descriptor:
                    os.dup2(nowhere, descriptor)
                    os.close(nowhere)
                os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace" if descriptor else "surrogateescape")


def _can_write(stream: TextIO) -> bool:
    """Flush a stream, and return whether that works. A broken stream is redirected to the null
    device, because otherwise it would fail again at exit, with a traceback.
    """
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return False
    return True


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Let Ctrl-C end the process at once, by its signal. During an import, ``KeyboardInterrupt``
    may be swallowed or become another error.
    """
    python = signal.default_int_handler
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is python  # else someone ignores or handles it
    )
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, python)


def train(words: Sequence[str], prog: str) -> int:
    """Train a new model on text, or resume a run."""
    tells = os.environ.get("RANK", "0") == "0"  # only one of torchrun's processes prints
    with _starting():
        try:
            with contextlib.nullcontext() if tells else _silence():
                config, settings = parse_training(
                    words,
                    prog=prog,
                    default=CONFIGS / "shakespeare.toml",
                    init=CONFIGS / "finetune.toml",
                    schema=TrainConfig,
                )
        except UsageError:
            if tells:
                raise
            # When one process exits, torchrun ends the others. Process 0 tells the mistake first.
            time.sleep(10)
            return 2
        from gpt.device import keep_freed_memory, return_freed_memory
        from gpt.generation.examples import ExampleEncoder
        from gpt.generation.frozen import freeze_rounded
        from gpt.training.interrupt import Output
        from gpt.training.run import train as run

    saves_memory = config.adapter.kind != "none" and config.adapter.base != "float32"
    (return_freed_memory if saves_memory else keep_freed_memory)()
    write: Write | None = None
    if config.objective.kind != "next_token":
        from gpt.generation.rollout import write_texts

        write = write_texts

    def sample(model: "GPT", data: "Data") -> "Shown":
        return _training_sample(config, model, data)

    if tells and settings.name != "shakespeare.toml":
        tell(f"settings {settings}, then the command line")

    def initial(name: "str | Path") -> "tuple[GPT, Tokenizer]":
        from gpt.interop.load import load, load_for_adapter

        say = tell if tells else lambda text: None
        if config.adapter.kind != "none" and config.adapter.base == "gguf":
            return load_for_adapter(name, say=say)
        return load(name, trainable=True, say=say)

    def named(name: str) -> "Tokenizer":
        from gpt.interop.named_tokenizer import named_tokenizer

        return named_tokenizer(name)

    console = open_console(cast(TextIO, Output(sys.stdout)))
    result = run(
        config,
        console=console,
        sample=sample,
        initial=initial,
        encoder=ExampleEncoder,
        named=named,
        freeze_rounded=freeze_rounded,
        write=write,
    )
    return 128 + result.signal if result.signal else 0


def sample(words: Sequence[str], prog: str) -> int:
    """Continue a prompt with a trained model."""
    with _starting():
        config = parse(SampleConfig, words, prog=prog)
        config = dataclasses.replace(config, stop=tuple(map(unescaped, config.stop)))
        prompt = None if config.takes_many else _given_prompt(config)
        if config.out is not None:
            check_output(config.out, "out")
        if config.explain:
            check_output(Path(config.explain[0]), "explain")
        from gpt.device import choose_device, keep_freed_memory
        from gpt.interop.load import load
        from gpt.terminal import Session

    keep_freed_memory()
    device = choose_device(config.device)
    adapter = config.adapter or None
    model = load(config.model, device=device, weights=config.weights, adapter=adapter, say=tell)
    draft = None
    if config.draft:
        draft = load(config.draft, device=device, weights=config.weights, say=tell)
    session = Session(config, model, draft)
    if config.takes_many:
        session.continue_file()
    elif prompt is not None:
        session.answer_once(prompt)
    else:
        session.ask()
    return 0


def export(words: Sequence[str], prog: str) -> int:
    """Write a model in Hugging Face's layout, packed for inference, or for llama.cpp."""
    with _starting():
        config = parse(ExportConfig, words, prog=prog)
        from gpt.generation.inference import prepare_for_inference
        from gpt.interop.export import export_huggingface
        from gpt.interop.gguf.export import export_gguf
        from gpt.interop.load import load
        from gpt.interop.packed import save_packed

    if config.to == "peft":
        return _export_peft(config)
    adapter = config.adapter or None
    loaded = load(config.model, dtype=None, trainable=True, adapter=adapter, say=tell)
    if config.to == "packed":
        packed = prepare_for_inference(loaded.model, config.weights)
        save_packed(packed, loaded.tokenizer, config.out)
    elif config.to == "gguf":
        export_gguf(loaded.model, loaded.tokenizer, config.out, weights=config.weights)
    else:
        export_huggingface(loaded.model, loaded.tokenizer, config.out, family=config.family)
    tell(f"{config.out}: {loaded.model.parameter_count():,} parameters")
    return 0


def tokenizer(words: Sequence[str], prog: str) -> int:
    """Train, compare, show or export a tokenizer."""
    from gpt.commands.tokenizer import run

    return run(words, prog)


def _export_peft(config: ExportConfig) -> int:
    """Write an adapter for the library PEFT."""
    from gpt.interop.adapters import add_adapter
    from gpt.interop.load import load
    from gpt.interop.peft import save_peft
    from gpt.model.adapter import adapter_weights

    model = load(config.model, trainable=True, say=tell).model
    before = model.config
    settings, _ = add_adapter(model, config.adapter, say=tell)
    if name := _changed(before, model.config):
        raise UsageError(
            f"the adapter was trained with model.{name} {getattr(model.config, name)}, the model "
            f"has {getattr(before, name)}, and PEFT's format cannot express it: export without --to"
        )
    save_peft(model, settings, config.model, config.out, family=config.family)
    count = sum(p.numel() for p in adapter_weights(model).values())
    tell(f"{config.out}: {count:,} parameters of an adapter")
    return 0


def _changed(before: "ModelConfig", after: "ModelConfig") -> str | None:
    """The first field that differs, of those on which logits depend in a context that both have."""
    from gpt.model.surgery import ROTARY

    names: tuple[str, ...] = ("rotary_base", "vocab_size")
    if not before.rotary_scaling == after.rotary_scaling == "none":
        before, after, names = before.resolved(), after.resolved(), (*ROTARY, "vocab_size")
    return next((n for n in names if getattr(before, n) != getattr(after, n)), None)


def evaluate(words: Sequence[str], prog: str) -> int:
    """Score models on a text, LAMBADA, HellaSwag, or your own multiple-choice questions."""
    with _starting():
        config = parse(EvaluateConfig, words, prog=prog)
        from gpt.device import keep_freed_memory
        from gpt.evaluation.report import as_json, as_table, measure

        console = open_console()
    keep_freed_memory()
    report = measure(config, say=tell)
    if config.json:
        sys.stdout.write(as_json(report))
    else:
        console.print(as_table(report), soft_wrap=False)
    return 0


def prepare(words: Sequence[str], prog: str) -> int:
    """Prepare texts for training: write their token shards."""
    from gpt.commands.prepare import prepare as run

    with _starting():
        config = parse(PrepareConfig, words, prog=prog)
    return run(config)


def inspect(words: Sequence[str], prog: str) -> int:
    """Show what is in prepared tokens: documents, lengths, frequent tokens."""
    from gpt.commands.inspect import inspect as run

    with _starting():
        config = parse(InspectConfig, words, prog=prog)
    return run(config)


def doctor(words: Sequence[str], prog: str) -> int:
    """Look at this machine: what it has, what to change, whether its results are right."""
    with _starting():
        config = parse(DoctorConfig, words, prog=prog)
        from gpt.commands.doctor import doctor as run

    return run(config)


def plan(words: Sequence[str], prog: str) -> int:
    """Say what a training run needs before it starts: memory, time, GPUs, the line to type."""
    with _starting():
        config, settings = parse_training(
            words,
            prog=prog,
            default=CONFIGS / "shakespeare.toml",
            init=CONFIGS / "finetune.toml",
            schema=PlanConfig,
        )
        from gpt.commands.plan import plan as run

    return run(config, settings, words)


def report(words: Sequence[str], prog: str) -> int:
    """Write a page about runs: curves over each other, settings, samples."""
    with _starting():
        config = parse(ReportConfig, words, prog=prog)
        from gpt.commands.report import report as run

    return run(config)


Command = Callable[[Sequence[str], str], int]
GROUPS: dict[str, dict[str, Command]] = {
    "what most people need": {"train": train, "sample": sample, "serve": serve},
    "texts": {"prepare": prepare, "inspect": inspect, "tokenizer": tokenizer},
    "models": {"evaluate": evaluate, "export": export},
    "runs and machines": {"plan": plan, "report": report, "doctor": doctor},
}
"""The commands by what they are for, the most used first."""
COMMANDS: dict[str, Command] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}


def _usage() -> str:
    lines = ["usage: gpt COMMAND [OPTIONS]"]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<10}{command.__doc__}" for name, command in group.items()]
    lines += ["", "gpt COMMAND --help lists the options"]
    lines += ["gpt --print-completion bash (or zsh) writes the shell's completion", ""]
    return "\n".join(lines)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _training_sample(config: TrainConfig, model: "GPT", data: "Data") -> "Shown":
    """For an evaluation during training: answers to questions, or a continued prompt."""
    from gpt.data.instructions import Instructions
    from gpt.data.mixture import Mixture
    from gpt.evaluation.answers import answer_questions, figures, shown
    from gpt.generation.text import generate
    from gpt.training.loop import Shown

    group, own = config.evaluation, (model, data.tokenizer)
    texts = data.texts if isinstance(data, Mixture) else [data]
    questions = next((text for text in texts if isinstance(text, Instructions)), None)
    if questions is not None:
        answers = answer_questions(own, questions.validation, group.answers)
        return Shown(shown(answers, SHOWN_ANSWERS), figures(answers)) if answers else Shown("")
    if not group.sample_tokens:
        return Shown("")
    prompt, n = group.sample_prompt, group.sample_tokens
    [sample] = generate(own, prompt, max_new_tokens=n, seed=SAMPLE_SEED)
    return Shown(prompt + sample.text)


def _given_prompt(config: SampleConfig) -> str | None:
    """The prompt from the command line, a file or a pipe; ``None`` on a terminal, where a session
    asks for it.
    """
    if config.prompt is not None:
        return config.prompt
    path = config.prompt_file
    if path is None:
        return None if sys.stdin.isatty() else _decoded(sys.stdin.buffer.read(), "standard input")
    if path.parent != Path("/dev/fd"):
        return as_training_text(read_text(path, "prompt_file"))
    try:  # a pipe that the shell opened: <(...)
        return _decoded(path.read_bytes(), f"prompt_file {foreign(path)}")
    except OSError as error:
        raise unreadable(path, "prompt_file", error) from None


def _decoded(content: bytes, what: str) -> str:
    try:
        return as_training_text(content.decode())
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what} is not UTF-8 text: {error.reason} at byte {error.start:,}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
