"""Requests to stop: Ctrl-C, SIGTERM (a preempted job), SIGHUP (a closed terminal), or a reader of
the output that has exited. The run finishes the current step and saves.
"""

import os
import signal
import time
from types import FrameType
from typing import Any, Self, TextIO


class Interrupt:
    """A context that stores the first signal in :attr:`signal`; a second one has its usual effect.

    A signal within ``patience`` seconds of the first counts as the same request. This happens with
    torchrun: SLURM sends SIGTERM to all processes of a job, and torchrun forwards its own. Signals
    that are ignored (SIGHUP, with nohup) stay ignored.
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
        """Whether the run should stop."""
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
    """A stream whose reader may exit (``train.py | head``). This counts as SIGTERM, and later
    output is discarded.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As in any text stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._left()
            return len(text)

    def flush(self) -> None:
        """As in any text stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._left()

    def _left(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        signal.raise_signal(signal.SIGTERM)
