"""The pieces of a corpus to ids, on all cores and in order: tiktoken releases Python's lock."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from gpt.config import Duplicates
from gpt.data.byte_pair import GPT2Tokenizer
from gpt.data.duplicates import keys
from gpt.data.formats import PIECE_CHARACTERS
from gpt.data.pieces import Piece
from gpt.data.tokenizer import Ids, Tokenizer, encode_documents, encoder


class Encoded(NamedTuple):
    """A piece, its ids, and the keys by which its document is compared."""

    piece: Piece
    ids: Ids
    """The end-of-text behind the document included."""
    keys: list[bytes]


def encoded(
    read: Iterable[Piece],
    tokenizer: Tokenizer,
    *,
    duplicates: Duplicates = "keep",
    workers: int = 0,
) -> Iterator[list[Encoded]]:
    """The pieces in blocks of about a million characters, with their ids, in order. ``workers``
    threads encode; 0: one for each core.
    """
    workers = workers or os.cpu_count() or 1
    waiting: deque[Future[list[Encoded]]] = deque()
    own = threading.local()

    def start() -> None:
        own.tokenizer = (
            tokenizer.for_thread() if isinstance(tokenizer, GPT2Tokenizer) else tokenizer
        )

    def encode(block: list[Piece]) -> list[Encoded]:
        return _encode(block, own.tokenizer, duplicates)

    with ThreadPoolExecutor(workers, initializer=start) as pool:
        try:
            for block in _blocks(read):
                waiting.append(pool.submit(encode, block))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _blocks(read: Iterable[Piece]) -> Iterator[list[Piece]]:
    block: list[Piece] = []
    size = 0
    for piece in read:
        block.append(piece)
        size += len(piece.text)
        if size >= PIECE_CHARACTERS and piece.after is not None:
            yield block
            block, size = [], 0
    if block:
        yield block


def _encode(block: list[Piece], tokenizer: Tokenizer, duplicates: Duplicates) -> list[Encoded]:
    first, later = (encoder(tokenizer, begins=begins) for begins in (True, False))
    whole = iter(encode_documents(tokenizer, [p.text for p in block if p.begins and p.ends]))
    end = np.array([tokenizer.end_of_text], np.uint32)
    done = []
    for piece in block:
        if piece.begins and piece.ends:
            done.append(Encoded(piece, next(whole), keys(piece.text, duplicates)))
            continue
        ids = (first if piece.begins else later)(piece.text)
        done.append(Encoded(piece, np.concatenate([ids, end]) if piece.ends else ids, []))
    return done
