"""A session on a terminal: prompts, their continuations as they are generated, and commands."""

import atexit
import contextlib
import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gpt import kernels
from gpt.config import GenerationConfig, SampleConfig, UsageError, foreign, quoted, unescaped
from gpt.files import as_training_text, check_output, sentence, unwritable, write_atomically
from gpt.generation.batch import continue_file
from gpt.generation.chat import Conversation
from gpt.generation.continuer import Continuer
from gpt.generation.explain import as_page, as_text, explain, token_text
from gpt.generation.inference import InferenceGPT
from gpt.generation.speculative import Speculator
from gpt.generation.text import Completion, encode_prompt, new_decoder, run
from gpt.interop.load import Loaded

HELP = """\
TEXT                continue this text; for several lines, put \"\"\" before and after it
/retry              continue the last text again, with new random numbers
/explain            show the last answer with each token shaded by its probability
/explain x.html     write that to a page
/settings           show all settings
/temperature 0.9    change a setting; any name of /settings works
Ctrl-C              stop the answer
Ctrl-D              end the session
"""
CHAT_HELP = """\
TEXT                a message to the model; for several lines, put \"\"\" before and after it
/retry              another answer to the last message, with new random numbers
/new                begin a new conversation
/explain            show the last answer with each token shaded by its probability
/explain x.html     write that to a page
/settings           show all settings
/temperature 0.9    change a setting; any name of /settings works
Ctrl-C              stop the answer
Ctrl-D              end the session
"""
_SETTABLE: dict[str, Callable[[str], object]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_new_tokens": int,
    "min_new_tokens": int,
    "num_samples": int,
    "num_beams": int,
    "length_penalty": float,
    "early_stopping": str,
    "past_context": str,
    "stop": str,
    "seed": int,
}


class Session:
    """A model, its current settings, and the last prompt with its answer."""

    def __init__(self, config: SampleConfig, model: Loaded, draft: Loaded | None = None) -> None:
        self.config, self.model, self.draft = config, model, draft
        self.prompt: str | None = None
        self.answer: list[int] = []
        self._retries = 0
        self._introduced = False
        self.conversation = self._new_conversation() if config.chat else None

    def _new_conversation(self) -> Conversation:
        config = self.config
        return Conversation(
            self.model,
            config,
            system=config.system,
            draft=self.draft,
            num_draft_tokens=config.num_draft_tokens,
            say=tell,
        )

    def _introduce(self) -> None:
        """Print once what the model is."""
        model = self.model.model
        if self._introduced or not isinstance(model, InferenceGPT):
            return
        self._introduced = True
        size = f"{model.parameter_count():,} parameters"
        tell(f"{self.config.model}: {size}, weights in {model.weights}, on {model.device}")
        if model.device.type == "cpu" and (problem := kernels.problem()):
            tell(f"{problem}; torch's operators run instead, which is slower")

    def answer_once(self, prompt: str) -> None:
        """Continue one prompt, and explain the answer if the configuration says so."""
        self.write(prompt)
        if self.config.explain is not None:
            self.explain(self.config.explain)

    def ask(self) -> None:
        """Ask for prompts until Ctrl-D."""
        _remember_lines()
        self._introduce()
        what = "message" if self.config.chat else "text to continue"
        tell(f"type a {what}; /help shows the commands; Ctrl-C stops, Ctrl-D ends")
        while True:
            try:
                line = _read()
            except EOFError:
                sys.stdout.write("\n")
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                continue
            try:
                if line.startswith("/"):
                    self.command(line)
                else:
                    self._retries = 0
                    self.write(line)
            except BrokenPipeError:  # nothing reads the output any more
                raise
            except (UsageError, OSError) as error:
                tell(sentence(error))
            except KeyboardInterrupt:
                sys.stdout.write("\n")

    def command(self, line: str) -> None:
        """Run a command: a line that begins with a slash."""
        name, *words = _words(line[1:]) or [""]
        if name == "help":
            tell((CHAT_HELP if self.config.chat else HELP).rstrip())
        elif name == "settings":
            for setting in _SETTABLE:
                tell(f"{setting:<20}{getattr(self.config, setting)}")
        elif name in ("retry", "explain") and self.prompt is None:
            raise UsageError(f"/{name} needs an answer, and there is none yet; type a text first")
        elif name == "retry":
            assert self.prompt is not None
            self._retries += 1
            self.write(self.prompt)
        elif name == "new" and self.config.chat:
            self.conversation, self.prompt = self._new_conversation(), None
        elif name == "explain":
            self.explain(words)
        elif name in _SETTABLE:
            self.config = _set(self.config, name, words)
        else:
            others = ["new"] if self.config.chat else []
            known = ", ".join(["help", "retry", *others, "explain", "settings", *_SETTABLE])
            raise UsageError(f"unknown command /{foreign(name)}; choose from {known}")

    def write(self, prompt: str) -> None:
        """Print the prompt and each sample: the first one while it is generated, the others after
        it is complete. In a conversation, print the answer.
        """
        config: GenerationConfig = self.config
        prompt = as_training_text(prompt)
        if config.seed is not None:
            config = dataclasses.replace(config, seed=config.seed + self._retries)
        if self.conversation is not None:
            self._answer(self.conversation, prompt, config)
            return
        decoder = self.decoder(config)
        pieces = run(self.model, [prompt], decoder)
        first = next(pieces)  # fails before a prompt that cannot be continued is printed
        waiting = [prompt] * config.num_samples
        self._introduce()
        self.prompt, self.answer = prompt, []
        sys.stdout.write(prompt)
        for piece, completion in itertools.chain([first], pieces):
            if completion.sample == 0:
                self.answer = self._shown(completion)
                sys.stdout.write(piece)
                sys.stdout.flush()
            else:
                waiting[completion.sample] += piece
        for text in waiting[1:]:
            sys.stdout.write(f"\n---\n{text}")
        sys.stdout.write("\n")
        if isinstance(decoder, Speculator):
            tell(_speculation(decoder))

    def _answer(self, conversation: Conversation, message: str, config: GenerationConfig) -> None:
        """Print the answer to a message while it is generated."""
        conversation.config = config
        pieces = conversation.retry() if self._retries else conversation.ask(message)
        with contextlib.closing(pieces):
            first = next(pieces, "")  # fails before anything is printed
            self._introduce()
            self.prompt, self.answer = message, []
            for piece in itertools.chain([first], pieces):
                sys.stdout.write(piece)
                sys.stdout.flush()
                self.answer = self._shown(conversation.completion)
        sys.stdout.write("\n")

    def _shown(self, completion: Completion) -> list[int]:
        """The tokens of a completion without those of the stop text."""
        tokens, size = list(completion.tokens), len(completion.text.encode())
        while completion.reason == "stop" and tokens:
            if len(self.model.tokenizer.decode_bytes(tokens)) <= size:
                break
            tokens.pop()
        return tokens

    def explain(self, page: Sequence[str] = ()) -> None:
        """Show the probabilities of the last answer: in the file ``page``, or on the terminal."""
        path = None
        if page:
            dataclasses.replace(self.config, explain=tuple(page))  # checks the name
            path = Path(page[0])
            check_output(path, "explain")
        assert self.prompt is not None
        tokenizer, ids = self.model.tokenizer, encode_prompt(self.model.tokenizer, self.prompt)
        if self.conversation is not None:
            ids = self.conversation.prompt
        tokens = explain(self.model, ids, self.answer)
        hidden = not self.prompt or ids[0] in tokenizer.first
        opening = "" if hidden else token_text(tokenizer, ids[0])
        if path is None:
            console = Console(highlight=False)
            text = as_text(tokens, opening=opening, ascii_only=console.options.ascii_only)
            console.print(text, soft_wrap=True)
            return
        title = f"{self.config.model}: {self.prompt[:60]!r}"
        try:
            write_atomically(path, as_page(tokens, title=title, opening=opening))
        except OSError as error:
            raise unwritable(path, error) from None
        tell(f"{path}: {len(tokens):,} tokens explained")

    def decoder(self, config: GenerationConfig) -> Continuer:
        """The decoder for ``config`` and the options."""
        return new_decoder(
            self.model,
            config,
            batch_size=self.config.batch_size,
            draft=self.draft,
            num_draft_tokens=self.config.num_draft_tokens,
        )

    def continue_file(self) -> None:
        """Continue the prompts of a file, with a progress bar."""
        assert self.config.prompt_file is not None
        assert self.config.out is not None
        columns = (
            BarColumn(),
            TextColumn(
                "{task.completed:,} of {task.total:,} prompts, {task.fields[rate]} tokens/s"
            ),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None, rate="0", visible=False)

            def show(done: int, total: int, tokens: int) -> None:
                seconds = bar.tasks[0].elapsed or 0.0
                rate = f"{tokens / seconds:,.0f}" if seconds else "0"
                bar.update(task, completed=done, total=total, rate=rate, visible=True)

            decoder = self.decoder(self.config)
            try:
                n = continue_file(
                    self.model,
                    self.config.prompt_file,
                    self.config.out,
                    decoder,
                    progress=show,
                )
            except KeyboardInterrupt:
                tell(f"stopped; run the same command again to continue {self.config.out}")
                raise
        self._introduce()
        tell(f"{self.config.out}: {n:,} prompts continued")
        if isinstance(decoder, Speculator):
            tell(_speculation(decoder))


def tell(text: str, *, file: TextIO | None = None) -> None:
    """Print a line to standard error, so that it is not part of the text."""
    (file or sys.stderr).write(text + "\n")


def _remember_lines() -> None:
    """Enable line editing, and keep the history of input() for the next session."""
    try:
        import readline
    except ImportError:  # not on Windows
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        path = (state if state.is_absolute() else Path.home() / ".local" / "state") / "gpt"
        path.mkdir(parents=True, exist_ok=True)
        (path / "history").touch()
        readline.read_history_file(path / "history")
        readline.set_history_length(1000)
        atexit.register(_write_history, path / "history")


def _write_history(path: Path) -> None:
    import readline

    with contextlib.suppress(OSError):
        readline.write_history_file(path)


def _read() -> str:
    """A prompt: one line, or several between triple quotes."""
    line = input("> ")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        try:
            lines.append(input("... "))
        except EOFError:  # ends the prompt, not the session
            return "\n".join(lines)
    lines[-1] = lines[-1].removesuffix('"""')
    return "\n".join(lines)


def _words(line: str) -> list[str]:
    """Split a line into words; a quoted text is one word."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise UsageError(f"/{foreign(line)} has an unclosed quote") from None


def _set(config: SampleConfig, name: str, words: list[str]) -> SampleConfig:
    value: object
    if name == "stop":
        value = tuple(map(unescaped, words))
    elif name == "seed" and words in ([], ["none"]):
        value = None
    elif len(words) != 1:
        raise UsageError(f"/{name} takes one value, as in /{name} {getattr(config, name)}")
    else:
        try:
            value = _SETTABLE[name](words[0])
        except ValueError:
            raise UsageError(f"/{name} takes a number, not {quoted(words[0])}") from None
    changes: dict[str, object] = {name: value}
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _speculation(decoder: Speculator) -> str:
    if not decoder.guesses:
        return "no tokens were guessed"
    fraction, tokens = decoder.accepted / decoder.guesses, decoder.written / decoder.rounds
    return (
        f"{decoder.accepted:,} of {decoder.guesses:,} guesses were right ({fraction:.0%}): "
        f"{tokens:.2f} tokens per forward pass"
    )
