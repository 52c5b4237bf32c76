"""The interface of every decoder: prompts in, tokens out."""

from collections.abc import Sequence
from typing import Protocol

from gpt.config import GenerationConfig
from gpt.generation.decode import Token


class Continuer(Protocol):
    """Continues prompts with the settings of its ``config``."""

    config: GenerationConfig

    @property
    def busy(self) -> bool:
        """Whether a sequence is waiting or running."""

    def add(self, prompt: Sequence[int], *, sample: int = 0) -> int:
        """Queue sample number ``sample`` of a prompt, and return the number of the sequence.
        ``UsageError`` if the model cannot continue the prompt.
        """

    def advance(self) -> list[Token]:
        """The next tokens of one or more sequences; none if it is not ``busy``."""

    def end(self, sequence: int) -> None:
        """Stop a sequence; it gets no more tokens."""
