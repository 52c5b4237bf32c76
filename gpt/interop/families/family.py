"""The interface of a family of models: a table from this project's parameters to their tensors.

:mod:`gpt.interop.weights` reads the table forward to load a model, and backward to export one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from gpt.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A tensor of theirs that holds a parameter or some of its rows."""

    theirs: str
    """Its name, as an exported file has it."""
    rows: slice | None = None
    """The rows of their tensor (after the transposition), with start and stop; ``None``: all, for a
    parameter with one part."""
    turn: bool = False
    """Whether they store the matrix transposed."""
    add: float = 0.0
    """A number that is added to their numbers when they are loaded."""


class Family(Protocol):
    """One ``model_type`` of Hugging Face's ``config.json``.

    A *bare* name of a tensor is one without ``prefix``, which a file may lack.
    """

    name: str
    """The name in messages."""
    prefix: str
    """The beginning of tensors' names, except in files of the model without its head."""
    layer: re.Pattern[str]
    """Matches the beginning of a layer's bare names; the first group is the layer's number."""
    buffers: re.Pattern[str]
    """Matches the bare names of tensors that files may have and a model does not need."""

    def config(self, theirs: dict[str, Any], *, say: Callable[[str], None]) -> ModelConfig:
        """The configuration from their ``config.json``. ``UsageError`` names a field that is not
        supported. ``say`` is told how the model differs from the file.
        """

    def sizes(self, config: ModelConfig) -> list[tuple[str, str, list[int]]]:
        """Tensors from which every size in their ``config.json`` can be checked, except the number
        of layers: the bare name, the fields that the shape depends on, and the shape.
        """

    def parts(self, name: str, config: ModelConfig) -> list[Part]:
        """Their tensors for this project's parameter ``name``. The parameter's rows are the rows of
        the parts, in order.
        """

    def exported(self, config: ModelConfig) -> dict[str, Any]:
        """The ``config.json`` of a model. ``UsageError`` names a setting that the family cannot
        express.
        """

    def stored(self, config: ModelConfig) -> ModelConfig:
        """The shape of the model in an exported file. It may have biases that the model lacks; the
        file then has zeros.
        """
