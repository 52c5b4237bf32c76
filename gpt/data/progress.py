"""How far a preparation is, for a display."""

import time
from collections.abc import Sequence
from itertools import accumulate

from gpt.data.compression import Tap


class Progress:
    """Bytes that were read and tokens that were written, also by an earlier preparation."""

    def __init__(self, sizes: Sequence[int | None]) -> None:
        """``sizes`` are the bytes of each file; ``None`` where it is not known."""
        self.total_bytes = 0 if None in sizes else sum(size or 0 for size in sizes)
        """Of all files; 0 if one's size is not known."""
        self.before = list(accumulate((size or 0 for size in sizes), initial=0))
        """Bytes of all files before each."""
        self.bytes = self.tokens = 0
        self.tap = Tap(count=self._count)
        """Counts the bytes that are read."""
        self.resume(0, 0)

    def resume(self, n_bytes: int, n_tokens: int) -> None:
        """Begin here: so much was done earlier."""
        self.bytes = self._bytes_before = n_bytes
        self.tokens = self._tokens_before = n_tokens
        self._started = time.monotonic()

    def _count(self, n: int) -> None:
        self.bytes += n

    @property
    def share(self) -> float:
        """The part of the bytes that was read; 0 if it is not known."""
        return min(1, self.bytes / self.total_bytes) if self.total_bytes else 0

    def _rate(self, n: int) -> float:
        return n / max(time.monotonic() - self._started, 1e-3)

    @property
    def bytes_per_second(self) -> float:
        """The rate since :meth:`resume`."""
        return self._rate(self.bytes - self._bytes_before)

    @property
    def tokens_per_second(self) -> float:
        """The rate since :meth:`resume`."""
        return self._rate(self.tokens - self._tokens_before)

    @property
    def seconds_left(self) -> int | None:
        """As far as the rate tells; ``None`` if the size or the rate is not known."""
        if not self.total_bytes or not self.bytes_per_second:
            return None
        return round(max(0, self.total_bytes - self.bytes) / self.bytes_per_second)
