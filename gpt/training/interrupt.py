"""Ctrl-C (and SIGTERM, of a job that is preempted) as a request: the step in hand is finished and
saved.
"""

import signal
from types import FrameType
from typing import Any, Self


class Interrupt:
    """While entered, the first signal sets :attr:`requested`; a second one acts as it usually
    does.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
