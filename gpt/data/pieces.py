"""The pieces of a corpus, each with its split and its place, so that reading can go on anywhere."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from gpt.data.compression import NO_TAP, Tap
from gpt.data.corpus import Corpus

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Splitter = Callable[[str, int, str], list[tuple[Split, str]]]
"""The first piece of a document, the characters of the corpus before the next piece, and that
piece, to its parts with their splits."""


class Place(NamedTuple):
    """How far a corpus has been read: ``piece`` pieces of document number ``document`` of file
    number ``file``, and ``characters`` in all.
    """

    file: int = 0
    document: int = 0
    piece: int = 0
    characters: int = 0


START = Place()


class Piece(NamedTuple):
    """A piece of a document."""

    text: str
    split: Split
    begins: bool
    """Whether the document begins with it."""
    ends: bool
    """Whether the document ends with it."""
    after: Place | None
    """The place behind it; ``None`` for the first part of a piece that is cut."""


def by_content(fraction: float) -> Splitter:
    """Documents are held out if the hash of their first piece is below ``fraction``: they stay on
    their side when the corpus grows, and equal documents are on one side.
    """
    limit = int(fraction * 2**64)

    def split(first: str, position: int, text: str) -> list[tuple[Split, str]]:
        digest = hashlib.blake2b(first.encode(errors="surrogatepass"), digest_size=8).digest()
        return [(SPLITS[int.from_bytes(digest) < limit], text)]

    return split


def at_end(boundary: int, *, whole_words: bool = False) -> Splitter:
    """The text is held out from the character ``boundary`` on; with ``whole_words`` from the white
    space before it.
    """

    def split(first: str, position: int, text: str) -> list[tuple[Split, str]]:
        cut = max(boundary - position, 0)
        while whole_words and 0 < cut < len(text) and not text[cut].isspace():
            cut -= 1
        parts: list[tuple[Split, str]] = [("train", text[:cut]), ("validation", text[cut:])]
        return [(side, part) for side, part in parts if part]

    return split


def pieces(
    corpus: Corpus,
    splitter: Splitter,
    *,
    start: Place = START,
    tap: Tap = NO_TAP,
) -> Iterator[Piece]:
    """The pieces from ``start`` on, in order. ``tap`` is told of the files' bytes,
    also of those before ``start`` in its file, which are read again.
    """
    position = start.characters
    for file in range(start.file, len(corpus.files)):
        skip = start if file == start.file else Place(file)
        for number, document in enumerate(corpus.read(corpus.files[file], tap)):
            texts = iter(document)
            first = text = next(texts, "")
            read = 1
            if number < skip.document:
                for _ in texts:
                    pass
                continue
            if number == skip.document:
                for _ in range(skip.piece):
                    text, read = next(texts, ""), read + 1
            while text:
                following = next(texts, "")
                parts = splitter(first, position, text)
                position += len(text)
                done = (number, read) if following else (number + 1, 0)
                for i, (split, part) in enumerate(parts):
                    last = i == len(parts) - 1
                    yield Piece(
                        part,
                        split,
                        begins=read == 1 and i == 0,
                        ends=last and not following,
                        after=Place(file, *done, position) if last else None,
                    )
                text, read = following, read + 1
