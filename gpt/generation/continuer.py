"""What every decoder does: prompts in, tokens out."""

from collections.abc import Sequence
from typing import Protocol

from gpt.config import GenerationConfig
from gpt.generation.decode import Token


class Continuer(Protocol):
    """Continues prompts as its ``config`` says."""

    config: GenerationConfig

    @property
    def busy(self) -> bool:
        """Whether there are tokens to come."""

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Take a prompt, to be continued as the ``sample``-th of its samples; returns the number of
        the sequence. ``UsageError`` if it cannot be continued.
        """

    def advance(self) -> list[Token]:
        """The next tokens of some sequences."""

    def end(self, sequence: int) -> None:
        """Write no more of the sequence."""
