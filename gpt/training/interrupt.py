"""Ctrl-C (and SIGTERM, of a job that is preempted) as a request: the step in hand is finished and
saved.
"""

import os
import signal
import time
from types import FrameType
from typing import Any, Self


class Interrupt:
    """While entered, the first signal is kept in :attr:`signal`; a second one acts as it usually
    does.

    Under torchrun, one within a second of the first is the same request: it passes on the Ctrl-C
    that its processes have had from the terminal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SAME = 1.0
    """Seconds."""

    def __init__(self) -> None:
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
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._since > self.SAME:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
