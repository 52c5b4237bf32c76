"""The command line: ``gpt train | sample | prepare | export | evaluate``.

``train.py`` and ``sample.py`` are the first two.

What is heavy is imported by the command that needs it, after its words were understood, so
``--help`` and a misspelt field answer at once. A user's mistake ends in one sentence and status 2;
with ``GPT_TRACEBACK=1`` in the environment, in Python's traceback.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from gpt.config import (
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    SampleConfig,
    TrainConfig,
    UsageError,
    parse,
    parse_training,
)

if TYPE_CHECKING:
    from gpt.data.tokenizer import Tokenizer
    from gpt.model.gpt import GPT

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SAMPLE_SEED = 0
"""Of the samples during training, so that they differ by what was learned and not by luck."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "gpt") -> int:
    """Run a command; the exit status is 0, 2 for what ends in a sentence (a mistake of the user's,
    a full disk, a run that diverged), 130 after Ctrl-C, or 143 after SIGTERM.
    """
    command, *words = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(f"{command!r} is no command; there are: {', '.join(COMMANDS)}")
        return COMMANDS[command](words, f"{prog} {command}" if prog == "gpt" else prog)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, OSError) as error:
        if os.environ.get("GPT_TRACEBACK"):
            raise
        sys.stderr.write(f"{prog}: {error}\n")
        return 2


def train(words: Sequence[str], prog: str) -> int:
    """Train a model on text: a new one, or go on with a run."""
    tells = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, one says what is wrong
    try:
        with contextlib.nullcontext() if tells else _silence():
            config, settings = parse_training(
                words,
                prog=prog,
                default=CONFIGS / "shakespeare.toml",
                init=CONFIGS / "finetune.toml",
            )
    except UsageError:
        if tells:
            raise
        return 2
    from rich.console import Console

    from gpt.device import keep_freed_memory
    from gpt.training.interrupt import Output
    from gpt.training.run import train as run

    keep_freed_memory()
    sample = None
    if config.evaluation.sample_tokens:

        def sample(model: "GPT", tokenizer: "Tokenizer") -> str:
            return _training_sample(config, model, tokenizer)

    if tells and settings.name != "shakespeare.toml":
        _tell(f"settings {settings}, then the command line")

    def initial(name: "str | Path") -> "tuple[GPT, Tokenizer]":
        from gpt.interop.load import load

        return load(name, trainable=True, say=_tell if tells else lambda text: None)

    console = Console(file=cast(TextIO, Output(sys.stdout)))
    result = run(config, console=console, sample=sample, initial=initial)
    return 128 + result.signal if result.signal else 0


def sample(words: Sequence[str], prog: str) -> int:
    """Continue a prompt with a trained model."""
    config = parse(SampleConfig, words, prog=prog)
    prompt = None if config.takes_many else _given_prompt(config)
    from gpt.device import choose_device, keep_freed_memory
    from gpt.interop.load import load
    from gpt.terminal import Session

    keep_freed_memory()
    device = choose_device(config.device)
    model = load(config.model, device=device, weights=config.weights, say=_tell)
    draft = None
    if config.draft:
        draft = load(config.draft, device=device, weights=config.weights, say=_tell)
    session = Session(config, model, draft)
    if config.takes_many:
        session.continue_file()
    elif prompt is not None:
        session.answer_once(prompt)
    else:
        session.ask()
    return 0


def prepare(words: Sequence[str], prog: str) -> int:
    """Turn a text into token shards, ahead of training on it."""
    config = parse(PrepareConfig, words, prog=prog)
    from rich.console import Console
    from rich.text import Text

    from gpt.data.prepare import prepare as run

    console = Console()
    with console.status("reading") as status:
        prepared = run(
            config.data,
            config.out,
            progress=lambda share: status.update(
                Text(f"preparing {config.data.source}: {share:.0%}")
            ),
            say=_tell,
        )
    console.print(
        f"{prepared.train.path.parent}: {len(prepared.train):,} training and "
        f"{len(prepared.validation):,} validation tokens",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def export(words: Sequence[str], prog: str) -> int:
    """Write a model in Hugging Face's layout, or packed to run."""
    config = parse(ExportConfig, words, prog=prog)
    from gpt.generation.inference import prepare_for_inference
    from gpt.interop.export import export_huggingface
    from gpt.interop.load import load
    from gpt.interop.packed import save_packed

    loaded = load(config.model, dtype=None, trainable=True, say=_tell)
    if config.to == "packed":
        packed = prepare_for_inference(loaded.model, config.weights)
        save_packed(packed, loaded.tokenizer, config.out)
    else:
        export_huggingface(loaded.model, loaded.tokenizer, config.out)
    _tell(f"{config.out}: {loaded.model.parameter_count():,} parameters")
    return 0


def evaluate(words: Sequence[str], prog: str) -> int:
    """Score models on a text, on LAMBADA or HellaSwag, or on choices of your own."""
    config = parse(EvaluateConfig, words, prog=prog)
    from gpt.device import keep_freed_memory
    from gpt.evaluation.report import as_json, as_table, measure

    keep_freed_memory()
    report = measure(config, say=_tell)
    if config.json:
        sys.stdout.write(as_json(report))
    else:
        from rich.console import Console

        Console().print(as_table(report))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "train": train,
    "sample": sample,
    "prepare": prepare,
    "export": export,
    "evaluate": evaluate,
}


def _usage() -> str:
    lines = [f"  {name:<9}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: gpt COMMAND [OPTIONS]", "", *lines, "", "gpt COMMAND --help has the rest", ""]
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


def _training_sample(config: TrainConfig, model: "GPT", tokenizer: "Tokenizer") -> str:
    """A prompt and what the model makes of it, for an evaluation during training."""
    from gpt.generation.text import generate

    prompt = config.evaluation.sample_prompt
    n = config.evaluation.sample_tokens
    [sample] = generate((model, tokenizer), prompt, max_new_tokens=n, seed=SAMPLE_SEED)
    return prompt + sample.text


def _given_prompt(config: SampleConfig) -> str | None:
    """The prompt of the command line, a file, or a pipe; ``None`` where a terminal is to be
    asked.
    """
    if config.prompt is not None:
        return config.prompt
    if config.prompt_file is not None:
        try:
            return config.prompt_file.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"prompt_file {config.prompt_file} cannot be read: {error.strerror}"
            ) from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"prompt_file {config.prompt_file} is not UTF-8 text: {error.reason}"
            ) from None
    return None if sys.stdin.isatty() else sys.stdin.read()


if __name__ == "__main__":
    sys.exit(main())
