"""What a family of models is: a table from this project's parameters to tensors in its files.

:mod:`gpt.interop.weights` reads the table forward to load a model, and backward to export one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from gpt.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A tensor of theirs that holds a parameter, or some of its rows."""

    theirs: str
    """Its name, as an exported file has it."""
    rows: slice | None = None
    """The rows of their tensor, turned where ``turn`` is set, with start and stop; ``None``:
    all, for a parameter with one part."""
    turn: bool = False
    """Whether they store the matrix transposed."""
    add: float = 0.0
    """What is added to their numbers when they are loaded."""


class Family(Protocol):
    """One ``model_type`` of Hugging Face's ``config.json``.

    Names of tensors are bare where it says so: without ``prefix``, which a file may lack.
    """

    name: str
    """How messages call it."""
    prefix: str
    """What names of tensors begin with, except in files of the model without its head."""
    layer: re.Pattern[str]
    """Matches the beginning of a bare name in a layer; the first group is the layer's number."""
    buffers: re.Pattern[str]
    """Matches whole bare names of tensors that files may hold and a model does not need."""

    def config(self, theirs: dict[str, Any], *, say: Callable[[str], None]) -> ModelConfig:
        """The configuration of their ``config.json``; ``UsageError`` names a field that is not
        supported. ``say`` is told how the model differs from what the file asks for.
        """

    def sizes(self, config: ModelConfig) -> list[tuple[str, str, list[int]]]:
        """Tensors whose shapes together show every size in their ``config.json`` but the number of
        layers: the bare name, the fields that the shape depends on, and the shape.
        """

    def parts(self, name: str, config: ModelConfig) -> list[Part]:
        """Their tensors for this project's parameter ``name``: the parameter's rows are the rows of
        the parts, in this order.
        """

    def exported(self, config: ModelConfig) -> dict[str, Any]:
        """The ``config.json`` of a model; ``UsageError`` names what the family cannot express."""

    def stored(self, config: ModelConfig) -> ModelConfig:
        """The shape of the model in an exported file. It may have biases where the model has none:
        the file has zeros there.
        """
