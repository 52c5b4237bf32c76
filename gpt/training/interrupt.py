"""Ctrl-C (and SIGTERM, of a job that is preempted) as a request: the step in hand is finished and
saved.
"""

import signal
import time
from types import FrameType
from typing import Any, Self


class Interrupt:
    """While entered, the first signal is kept in :attr:`signal`; a second one acts as it usually
    does.

    One within ``patience`` seconds of the first is the same request. Under torchrun there are such:
    SLURM sends SIGTERM to all processes of a job, and torchrun passes its own on.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

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
        self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
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
