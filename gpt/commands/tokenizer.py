"""``gpt tokenizer train | compare | show | export``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt.config import UsageError, foreign, parse
from gpt.config.tokenizer import (
    TokenizerCompareConfig,
    TokenizerExportConfig,
    TokenizerShowConfig,
    TokenizerTrainConfig,
)
from gpt.console import open_console, tell


def run(words: Sequence[str], prog: str) -> int:
    """Run the command that the first word names."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {each:<9}{command.__doc__}" for each, command in COMMANDS.items()]
        sys.stdout.write("\n".join([f"usage: {prog} COMMAND [OPTIONS]", "", *lines, ""]))
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UsageError(f"unknown command {foreign(repr(name))}; choose from {known}")
    COMMANDS[name](rest, f"{prog} {name}")
    return 0


def train(words: Sequence[str], prog: str) -> None:
    """Train a tokenizer on a text."""
    config = parse(TokenizerTrainConfig, words, prog=prog)
    from gpt.data.corpus import open_corpus
    from gpt.data.piped import keep
    from gpt.data.reading import Reading
    from gpt.data.tokenizer import to_json
    from gpt.data.tokenizer_training import tokenizer_of_text
    from gpt.files import new_file

    console = open_console()
    data = keep(config.data, config.cache_dir)
    with new_file(config.out) as file, console.status("reading", spinner="line") as status:
        corpus = open_corpus(data.source, Reading.of(data), field="source", say=tell)
        survey = corpus.survey(characters=config.tokenizer == "char")
        if not survey.length:
            raise UsageError(f"source is {foreign(config.source)}, which has no text")
        status.update("training")
        tokenizer = tokenizer_of_text(
            data,
            corpus.documents(),
            length=survey.length,
            characters=survey.characters,
            special_tokens=config.special_tokens,
            say=tell,
        )
        file.write(to_json(tokenizer).encode())
    console.print(
        f"{config.out}: {tokenizer.vocab_size:,} tokens from {survey.length:,} characters"
    )


def compare(words: Sequence[str], prog: str) -> None:
    """Compare tokenizers on a text."""
    config = parse(TokenizerCompareConfig, words, prog=prog)
    from gpt.data.corpus import open_corpus
    from gpt.evaluation.tokens import as_json, as_table, measure
    from gpt.interop.named_tokenizer import named_tokenizer

    named = {name: named_tokenizer(name, field="tokenizers") for name in config.tokenizers}
    corpus = open_corpus(config.on, field="on", say=tell)
    report = {name: measure(tokenizer, corpus) for name, tokenizer in named.items()}
    if config.json:
        sys.stdout.write(as_json(report))
    else:
        open_console().print(as_table(report), soft_wrap=False)


def show(words: Sequence[str], prog: str) -> None:
    """Show the tokens of a text, and their ids."""
    config = parse(TokenizerShowConfig, words, prog=prog)
    from gpt.data.tokenizer import encode_special, prompt_ids
    from gpt.evaluation.tokens import pieces_as_text, shown
    from gpt.interop.named_tokenizer import named_tokenizer

    tokenizer = named_tokenizer(config.tokenizer, field="tokenizer")
    if config.special:
        ids = [*tokenizer.first, *encode_special(tokenizer, config.text).tolist()]
    else:
        ids = prompt_ids(tokenizer, config.text) if config.text else []
    console = open_console()
    pieces = shown(tokenizer, ids)
    for line in pieces_as_text(pieces, ids, colours=console.is_terminal):
        console.print(line)


def export(words: Sequence[str], prog: str) -> None:
    """Write a tokenizer in the format of Hugging Face's tokenizer.json."""
    config = parse(TokenizerExportConfig, words, prog=prog)
    from gpt.files import new_file, new_folder
    from gpt.interop.named_tokenizer import named_tokenizer
    from gpt.interop.vocabulary_export import hugging_face_files

    tokenizer = named_tokenizer(config.tokenizer, field="tokenizer")
    files = hugging_face_files(tokenizer)
    if config.out.suffix == ".json":
        with new_file(config.out) as file:
            file.write(files["tokenizer.json"].encode())
    else:
        with new_folder(config.out) as folder:
            for name, text in files.items():
                Path(folder / name).write_text(text, encoding="utf-8")
    tell(f"{config.out}: {tokenizer.vocab_size:,} tokens")


COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {
    "train": train,
    "compare": compare,
    "show": show,
    "export": export,
}
