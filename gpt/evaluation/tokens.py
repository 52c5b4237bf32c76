"""How a tokenizer cuts a text: its figures on a corpus, and the pieces of a short text."""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from gpt.data.corpus import Corpus
from gpt.data.tokenizer import Tokenizer, byte_lengths, encoder, special_tokens

EXAMPLES = 5
"""Longest and unused tokens that are named."""
COLOURS = ("on #3b5b8c", "on #3b7a57", "on #8c6d3b", "on #7a3b6d", "on #4d4d8c")


@dataclass(frozen=True)
class Tokens:
    """The figures of a tokenizer on a text."""

    vocab_size: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    """A word is a run of characters that are not white space."""
    mb_per_second: float
    """Encoding alone, in one thread."""
    unused: int
    """Tokens that the text does not have, special ones left out."""
    longest: list[str]
    unused_examples: list[str]
    """The longest ones of those that are not used."""


def measure(tokenizer: Tokenizer, corpus: Corpus) -> Tokens:
    """Encode a corpus and count. Memory is bounded, as for :func:`gpt.data.prepare.prepare`."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    n_bytes = words = 0
    seconds = 0.0
    for document in corpus.documents():
        for number, piece in enumerate(document):
            encode = encoder(tokenizer, begins=number == 0)
            start = time.perf_counter()
            ids = encode(piece)
            seconds += time.perf_counter() - start
            counts += np.bincount(ids, minlength=len(counts))
            n_bytes += len(piece.encode())
            words += sum(1 for _ in re.finditer(r"\S+", piece))
    total = int(counts.sum())
    special = set(special_tokens(tokenizer).values())
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in special]
    lengths = byte_lengths(tokenizer)
    ordinary.sort(key=lambda i: -int(lengths[i]))
    unused = [i for i in ordinary if not counts[i]]
    return Tokens(
        vocab_size=tokenizer.vocab_size,
        tokens=total,
        bytes_per_token=n_bytes / max(total, 1),
        tokens_per_word=total / max(words, 1),
        mb_per_second=n_bytes / 1e6 / max(seconds, 1e-9),
        unused=len(unused),
        longest=shown(tokenizer, ordinary[:EXAMPLES]),
        unused_examples=shown(tokenizer, unused[:EXAMPLES]),
    )


def as_json(report: Mapping[str, Tokens]) -> str:
    """The figures of each tokenizer, as a JSON object."""
    return json.dumps({name: asdict(tokens) for name, tokens in report.items()}, indent=2) + "\n"


def as_table(report: Mapping[str, Tokens]) -> Table:
    """The figures, a tokenizer a column."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column()
    for name in report:
        table.add_column(name, justify="right", overflow="fold")
    all_tokens = list(report.values())
    rows: dict[str, list[str]] = {
        "tokens in the vocabulary": [f"{t.vocab_size:,}" for t in all_tokens],
        "tokens of the text": [f"{t.tokens:,}" for t in all_tokens],
        "bytes a token": [f"{t.bytes_per_token:.3f}" for t in all_tokens],
        "tokens a word": [f"{t.tokens_per_word:.3f}" for t in all_tokens],
        "MB/s": [f"{t.mb_per_second:.1f}" for t in all_tokens],
        "unused tokens": [f"{t.unused:,}" for t in all_tokens],
        "the longest": [_listed(t.longest) for t in all_tokens],
        "the longest unused": [_listed(t.unused_examples) for t in all_tokens],
    }
    for name, cells in rows.items():
        table.add_row(name, *map(Text, cells))
    return table


def _listed(pieces: Iterable[str], longest: int = 24) -> str:
    visible = (piece.replace(" ", "␣") for piece in pieces)
    return "\n".join(p if len(p) <= longest else f"{p[: longest - 1]}…" for p in visible)


def shown(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    r"""Each token as a text to print: its characters; control characters and single bytes of a
    character escaped (``\n``, ``\xe4``); the text of a special token.
    """
    special = {i: text for text, i in special_tokens(tokenizer).items()}
    return [special.get(i) or _printable(tokenizer.decode_bytes([i])) for i in ids]


def _printable(content: bytes) -> str:
    text = content.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pieces_as_text(pieces: Sequence[str], ids: Sequence[int], *, colours: bool) -> list[Text]:
    """The pieces in a line and their ids below: in alternating colours, or with ``|`` between the
    pieces; then their number.
    """
    cells = zip(pieces, map(str, ids), strict=True)
    lines = Text(no_wrap=False), Text(no_wrap=False)
    for i, cell in enumerate(cells):
        for line, text in zip(lines, cell, strict=True):
            if colours:
                line.append(text, COLOURS[i % len(COLOURS)])
                line.append(" " if line is lines[1] else "")
            else:
                line.append(("|" if i else "") + text)
    return [*lines, Text(f"{len(ids):,} token{'s' * (len(ids) != 1)}")]
