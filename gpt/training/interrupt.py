"""Ctrl-C, SIGTERM (of a job that is preempted), SIGHUP (of a terminal that is closed) and a reader
that has left as a request: the step in hand is finished and saved.
"""

import os
import signal
import time
from types import FrameType
from typing import Any, Self, TextIO


class Interrupt:
    """While entered, the first signal is kept in :attr:`signal`; a second one acts as it usually
    does.

    One within ``patience`` seconds of the first is the same request. Under torchrun there are such:
    SLURM sends SIGTERM to all processes of a job, and torchrun passes its own on. What is ignored
    (SIGHUP, under nohup) stays ignored.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self, *, patience: float = 0.0) -> None:
        self.patience = patience
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self.signal is not None

    def __enter__(self) -> Self:
        heard = [n for n in self.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._request) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
        elif now - self._since >= self.patience:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Output:
    """A stream whose reader may leave (``train.py | head``): that counts as SIGTERM, and what is
    written afterwards goes nowhere.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._left()
            return len(text)

    def flush(self) -> None:
        """As of any stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._left()

    def _left(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        signal.raise_signal(signal.SIGTERM)
