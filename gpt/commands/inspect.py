"""``gpt inspect``: a table of what is in prepared tokens."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from gpt.config import DataConfig, InspectConfig, UsageError, quoted
from gpt.console import files_of, open_console
from gpt.data.corpus import PREPARED_FILES
from gpt.data.inspection import Inspection
from gpt.data.inspection import inspect as inspect_shards
from gpt.data.pieces import SPLITS, Split
from gpt.data.prepare import prepare as prepare_tokens
from gpt.data.prepared import Prepared, is_corpus, read_corpus, read_prepared
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import Tokenizer, decode, end_text

BAR = 40
"""Characters of the longest bar."""


def inspect(config: InspectConfig) -> int:
    """Run the command."""
    data = _opened(config.path)
    found = {
        split: inspect_shards(
            getattr(data, split),
            data.tokenizer,
            frequent=config.frequent,
            first=config.documents if split == "train" else 0,
            characters=config.characters,
        )
        for split in SPLITS
    }
    if config.json:
        named = {split: dataclasses.asdict(each) for split, each in found.items()}
        sys.stdout.write(json.dumps(named, default=str, indent=1) + "\n")
    else:
        _print(found, data.tokenizer)
    return 0


def _opened(path: Path) -> Prepared:
    """The tokens at ``path``: a prepared folder, a run with its cache, or other projects' files."""
    if is_corpus(str(path)):
        return read_corpus(path)
    if is_token_files(str(path)):
        return prepare_tokens(DataConfig(source=str(path), tokenizer="gpt2"), path)
    caches = [path, *sorted((path / "data").glob("*")), *sorted(path.glob("*"))]
    for folder in caches:
        if all((folder / name).is_file() for name in PREPARED_FILES):
            return read_prepared(folder)
    raise UsageError(
        f"{quoted(str(path))} has no prepared tokens; give the folder that gpt prepare wrote, a "
        "run's folder, or files of token ids"
    )


def _print(found: Mapping[Split, Inspection], tokenizer: Tokenizer) -> None:
    console = open_console()
    for split, each in found.items():
        console.print(
            f"{split}: {each.tokens:,} tokens in {files_of(each.files)}, {each.documents:,} "
            f"documents, {each.bytes / max(1, each.tokens):.2f} bytes a token, longest document "
            f"{each.longest:,} tokens, {each.unused:,} of {tokenizer.vocab_size:,} ids unused"
        )
    train = found["train"]
    most = max((n for _, n in train.lengths), default=1) or 1
    block = "#" if console.options.ascii_only else "█"
    lengths = Table("tokens a document, up to", "documents", "", box=None)
    for bound, n in train.lengths:
        lengths.add_row(f"{bound:,}", f"{n:,}", block * round(BAR * n / most))
    console.print(lengths)
    frequent = Table("frequent token", "id", "times", box=None)
    for i, n in train.frequent:
        text = end_text(tokenizer) if i == tokenizer.end_of_text else decode(tokenizer, [i])
        frequent.add_row(Text(repr(text)), str(i), f"{n:,}")
    console.print(frequent)
    for number, text in enumerate(train.first, 1):
        console.print(Text(f"document {number}: {text!r}"))
