"""From text to tokens: ``python benchmarks/tokenizer.py``.

``tokenizers`` trains a vocabulary of 8,192 byte pairs on 100 MB, and so does the library
``tokenizers`` from the same file. The text is what Python packages are installed here, their source
code; ``--text FILE`` gives another one. Then it compares vocabularies on Chinese texts, of Debian's
packages fortunes-zh (poems and sayings) and debian-reference-zh-cn (a manual), or ``--chinese
FILE``, and on Python code: each learns from the first nine tenths, and encodes the last tenth.
"""

import argparse
import json
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from machine import show
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt.data.corpus import open_corpus
from gpt.data.patterns import steps_of
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.data.tokenizer_training import sampled, train_byte_pairs

SIZE = 100_000_000
VOCAB_SIZE = 8192
CHINESE = [
    Path("/usr/share/games/fortunes/chinese.u8"),
    Path("/usr/share/debian-reference/debian-reference.zh-cn.txt.gz"),
]


def installed_code(path: Path, size: int) -> None:
    """Write the source code of the installed packages to ``path``, ``size`` bytes of it."""
    folders = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    with path.open("wb") as out:
        for file in files:
            try:
                text = file.read_bytes().decode().replace("\r\n", "\n").replace("\0", "")
            except (OSError, UnicodeDecodeError):
                continue
            out.write(text.encode()[: size - out.tell()].decode(errors="ignore").encode())
            if out.tell() >= size - 4:
                return


def by_the_library(path: Path) -> None:
    """The library's own training, which reads the file itself."""
    engine = Tokenizer(models.BPE())
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    before = Tokenizer.from_str(json.dumps(empty | {"pre_tokenizer": steps_of("gpt2")}))
    engine.pre_tokenizer = before.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train([str(path)], trainer)


def by_this_project(path: Path) -> None:
    """``gpt tokenizer train``: a pass over the text to measure it, then training."""
    corpus = open_corpus(str(path))
    length = corpus.survey().length
    train_byte_pairs(sampled(corpus.documents(), length), vocab_size=VOCAB_SIZE)


def training(path: Path) -> Table:
    """Seconds of both on one text, by turns."""
    seconds: dict[str, list[float]] = {"tokenizers": [], "gpt tokenizer train": []}
    runs: dict[str, Callable[[Path], None]] = {
        "tokenizers": by_the_library,
        "gpt tokenizer train": by_this_project,
    }
    for _ in range(3):
        for name, run in runs.items():
            start = time.perf_counter()
            run(path)
            seconds[name].append(time.perf_counter() - start)
    table = Table(title=f"training {VOCAB_SIZE:,} byte pairs on {path.stat().st_size:,} bytes")
    for column in ("", "seconds, 3 runs", "median to the library's"):
        table.add_column(column, justify="right")
    usual = sorted(seconds["tokenizers"])[1]
    for name, times in seconds.items():
        shown = ", ".join(f"{each:.1f}" for each in times)
        table.add_row(name, shown, f"{sorted(times)[1] / usual:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    table.caption = f"peak memory of the process: {peak:.2f} GB"
    return table


def read(path: Path) -> str:
    """A whole text, decompressed if needed."""
    return "".join(p for document in open_corpus(str(path)).documents() for p in document)


def vocabularies(texts: dict[str, str], patterns: list[str]) -> Table:
    """Tokens of the last tenth of each text, for GPT-2's vocabulary and trained ones."""
    table = Table(title=f"tokens of unseen text, {VOCAB_SIZE:,} tokens in the trained vocabularies")
    for column in ("text", "tokenizer", "tokens", "bytes a token", "to GPT-2's"):
        table.add_column(column, justify="right")
    gpt2 = GPT2Tokenizer.released()
    for name, text in texts.items():
        cut = text.rfind("\n", 0, len(text) * 9 // 10)
        seen, unseen = text[:cut], text[cut:]
        size, theirs = len(unseen.encode()), len(gpt2.encode(unseen))
        table.add_row(name, "GPT-2's", f"{theirs:,}", f"{size / theirs:.2f}", "1.00")
        for pattern in patterns:
            made = train_byte_pairs([seen], vocab_size=VOCAB_SIZE, pattern=pattern)
            n = len(made.encode(unseen))
            table.add_row("", pattern, f"{n:,}", f"{size / n:.2f}", f"{n / theirs:.2f}")
    return table


def tokenizers(options: argparse.Namespace) -> None:
    """The part that the module's docstring describes."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.text or Path(folder) / "code.txt"
        if options.text is None:
            installed_code(path, SIZE)
        show(training(path))
        code = read(path)[:8_000_000]
    found = [path for path in options.chinese or CHINESE if path.exists()]
    if found:
        show(vocabularies({path.name: read(path) for path in found}, ["gpt2", "cl100k", "chinese"]))
    else:
        sys.stderr.write("no Chinese text: apt install fortunes-zh debian-reference-zh-cn\n")
    show(vocabularies({"code": code}, ["gpt2", "cl100k", "tekken", "code"]))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"tokenizers": tokenizers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--text", type=Path, help="the text to train on")
    parser.add_argument("--chinese", type=Path, nargs="*", help="Chinese texts")
    options = parser.parse_args()
    for name in options.parts or PARTS:
        PARTS[name](options)


if __name__ == "__main__":
    main()
