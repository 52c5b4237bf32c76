"""The tensors of a family's files as a table: the names of modules, and how matrices are stored.

:mod:`gpt.interop.weights` reads the table forward to load a model, and backward to export one.
"""

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

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
    stack: int = 0
    """If it is not 0, they store so many matrices in one tensor ``[stack, rows, columns]``, and
    ``rows`` counts on from one matrix to the next."""


class Tensors:
    """The tensors of one family. A *bare* name is one without ``prefix``, which a file may lack."""

    modules: ClassVar[Mapping[str, str]]
    """This project's modules and theirs, without the prefix and the layer."""
    layers: ClassVar[str] = "layers"
    """What comes before a layer's number."""
    prefix: ClassVar[str] = "model."
    """The beginning of tensors' names, except in files of the model without its head."""
    head: ClassVar[str] = "lm_head.weight"
    """The tensor of the head in an exported file."""
    is_turned: ClassVar[bool] = False
    """Whether they store the matrices of a block transposed (``Conv1D``)."""
    qkv: ClassVar[str] = "apart"
    """How queries, keys and values are stored: ``apart`` in three tensors, ``fused`` in this
    project's order, or ``by_head``, a head's query, key and value beside each other."""
    added: ClassVar[float] = 0.0
    """A number that is added to norms' weights when they are loaded."""
    renamed: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Other names that files may have: a regular expression, and what replaces its matches."""
    has_stacked_experts: bool = False
    """Whether the experts of a layer are two tensors, as ``transformers`` 5 has them in memory."""
    ignored: ClassVar[str] = r"self_attn\.rotary_emb\.inv_freq"
    """Tensors of a layer that a file may have and a model does not need."""

    @property
    def layer(self) -> re.Pattern[str]:
        """Matches the beginning of a layer's bare names; the first group is the layer's number."""
        return re.compile(rf"{self.layers}\.(\d+)\.")

    @property
    def buffers(self) -> re.Pattern[str]:
        """Matches the bare names of tensors that files may have and a model does not need."""
        return re.compile(rf"{self.layers}\.\d+\.(?:{self.ignored})")

    def stored_as(self, names: Collection[str]) -> Self:
        """The table for a file whose tensors have these bare ``names``."""
        family = copy.copy(self)
        family.has_stacked_experts = any(name.endswith(".experts.gate_up_proj") for name in names)
        return family

    def parts(self, name: str, config: ModelConfig) -> list[Part]:
        """Their tensors for this project's parameter ``name``. The parameter's rows are the rows of
        the parts, in order.
        """
        if name == "head.weight":
            return [Part(self.head)]
        own = config.resolved()
        module, kind = name.rsplit(".", 1)
        layer = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            layer = f"{self.layers}.{number}."
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", module)
        if expert and self.has_stacked_experts:
            at = f"{self.prefix}{layer}{self.modules['mlp.experts.up']}"
            return [_stacked(at.partition(".{}")[0], int(expert[1]), expert[2], own)]
        if expert:
            theirs = self.modules[f"mlp.experts.{expert[2]}"].format(expert[1])
        else:
            theirs = self.modules[module]
        D, H, G = own.head_dim, own.n_head, own.n_kv_head
        at = f"{self.prefix}{layer}{theirs}.{kind}"
        if module == "attn.qkv" and self.qkv == "apart":
            heads = zip("qkv", (H, G, G), strict=True)
            return [Part(at.format(letter), slice(0, n * D)) for letter, n in heads]
        if module == "attn.qkv" and self.qkv == "by_head":
            starts = [(3 * head + which) * D for which in range(3) for head in range(H)]
            return [Part(at, slice(start, start + D)) for start in starts]
        is_norm = module.endswith("norm") and kind == "weight"
        turn = self.is_turned and layer != "" and kind == "weight" and not is_norm
        return [Part(at, turn=turn, add=self.added if is_norm else 0.0)]


def _stacked(place: str, expert: int, matrix: str, config: ModelConfig) -> Part:
    """A matrix of an expert, where all experts of a layer are in two tensors: ``gate_up_proj``,
    each expert's gate before its ``up``, and ``down_proj``. ``config`` is resolved.
    """
    if matrix == "down":
        name, rows, number = "down_proj", config.n_embd, expert
    else:
        name, rows, number = "gate_up_proj", config.n_inner, 2 * expert + (matrix == "up")
    at = slice(number * rows, (number + 1) * rows)
    return Part(f"{place}.{name}", at, stack=config.n_expert)
