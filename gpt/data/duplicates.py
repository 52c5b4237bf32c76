"""Documents that occur more than once, found in one pass and in little memory.

Two documents are exact duplicates if their texts are equal after Unicode's NFKC, case folding, and
with one space for all white space. They are near duplicates if their MinHash signatures (Broder,
1997) agree in one of 14 bands of 8 numbers: with 5 words a shingle that finds three quarters of the
pairs of Jaccard similarity 0.75, as for FineWeb (Penedo et al., 2024, arXiv:2406.17557). The hashes
are in an SQLite file, so memory does not grow. The first of several duplicates is kept.
"""

import hashlib
import sqlite3
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.config import Duplicates, UsageError, foreign
from gpt.data.compression import extra

BANDS, ROWS, SHINGLE = 14, 8, 5
MOST_SHINGLES = 20_000
"""A longer document is compared by its first shingles."""


def normalised(text: str) -> str:
    """The text as it is compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def keys(text: str, kind: Duplicates) -> list[bytes]:
    """The hashes by which a document is compared: of the whole, and for ``near`` of each band."""
    if kind == "keep":
        return []
    plain = normalised(text)
    found = [hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=16).digest()]
    if kind == "near":
        found += _bands(plain.split(" "))
    return found


def _bands(words: Sequence[str]) -> list[bytes]:
    minhash: Any = extra("datasketch", "--duplicates near", "dedup")
    n = max(1, min(len(words) - SHINGLE + 1, MOST_SHINGLES))
    shingles = {" ".join(words[i : i + SHINGLE]).encode(errors="surrogatepass") for i in range(n)}
    signature = minhash.MinHash(num_perm=BANDS * ROWS, seed=1)
    signature.update_batch(sorted(shingles))
    bands = signature.hashvalues.astype("<u8").reshape(BANDS, ROWS)
    return [
        hashlib.blake2b(bytes([number]) + band.tobytes(), digest_size=16).digest()
        for number, band in enumerate(bands)
    ]


class Seen:
    """The hashes of the documents so far, in the file at ``path``.

    ``mark`` is the caller's number of the work so far: after a failure, :meth:`back_to` forgets
    what came after a mark.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, mark INTEGER) WITHOUT ROWID"
            )
            self._file.execute("BEGIN")
        except sqlite3.Error as error:
            raise self._broken(error) from None

    def add(self, keys: Sequence[bytes], mark: int) -> str:
        """``exact`` or ``near`` if a document with one of these keys came before; else the keys are
        added, and the result is empty.
        """
        try:
            for number, key in enumerate(keys):
                if self._file.execute("SELECT 1 FROM seen WHERE key = ?", (key,)).fetchone():
                    return "near" if number else "exact"
            rows = [(key, mark) for key in keys]
            self._file.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._broken(error) from None
        return ""

    def flush(self) -> None:
        """Wait until all hashes are on the disk."""
        try:
            self._file.execute("COMMIT")
            self._file.execute("BEGIN")
        except sqlite3.Error as error:
            raise self._broken(error) from None

    def back_to(self, mark: int) -> None:
        """Forget what was added with a larger mark."""
        try:
            self._file.execute("DELETE FROM seen WHERE mark > ?", (mark,))
        except sqlite3.Error as error:
            raise self._broken(error) from None
        self.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _broken(self, error: sqlite3.Error) -> UsageError:
        return UsageError(
            f"the hashes in {foreign(self.path)} cannot be used ({foreign(error)}); delete the "
            "folder, and prepare it again"
        )
