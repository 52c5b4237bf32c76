"""A family of models as a table, which is read forward to load a model and backward to export one.

A family's file says what all its models have in common (``fixed``), which fields of their
``config.json`` hold the other settings (``settings``), and what their modules are called
(``modules``). What is no plain field is a method: :meth:`Family.others` and its
inverse :meth:`Family.others_of`. :mod:`gpt.interop.weights` moves the weights by the same table.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gpt.config import ModelConfig, UsageError, quoted
from gpt.interop.families.fields import ACTIVATION_NAMES, activation, check_not_quantised, field

UNUSED = {"initial", "moe_capacity", "moe_balance", "moe_balance_weight", "moe_z_weight"}
"""Fields that do not matter for a finished model."""
BIASES = {"bias", "norm_bias", "qkv_bias", "mlp_bias"}
"""Fields of biases."""
_QUIET: Callable[[str], None] = lambda text: None  # noqa: E731


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


@dataclass(frozen=True)
class Setting:
    """A field of their ``config.json`` that holds a field of :class:`ModelConfig`."""

    theirs: str
    default: Any
    """Of a file without the field, as in ``transformers``."""
    aliases: tuple[str, ...] = ()
    """Other names that their configuration accepts."""


class Family:
    """One ``model_type`` of Hugging Face's ``config.json``.

    A *bare* name of a tensor is one without ``prefix``, which a file may lack.
    """

    name: ClassVar[str]
    """The name in messages."""
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    """The class of ``transformers``."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Fields of :class:`ModelConfig` that all models have, where they differ from GPT-2's."""
    settings: ClassVar[Mapping[str, Setting]]
    """The other fields, and where they are."""
    needs: ClassVar[Mapping[str, Any]] = {}
    """Their fields that must have this value, or be absent."""
    dropouts: ClassVar[tuple[str, ...]] = ()
    """Their fields of dropout probabilities, the first of which is used."""
    dropout: ClassVar[float] = 0.0
    """Their default."""
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
    always_biased: ClassVar[bool] = False
    """Whether all linear layers and norms have biases in a file."""
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

    def stored_as(self, names: Collection[str]) -> "Family":
        """The table for a file whose tensors have these bare ``names``."""
        family = copy.copy(self)
        family.has_stacked_experts = any(name.endswith(".experts.gate_up_proj") for name in names)
        return family

    def config(self, theirs: dict[str, Any], *, say: Callable[[str], None]) -> ModelConfig:
        """The configuration from their ``config.json``. ``UsageError`` names a field that is not
        supported. ``say`` is told how the model differs from the file.
        """
        check_not_quantised(theirs)
        for name, value in self.needs.items():
            found = theirs.get(name, value)
            if found != value and found is not None:
                raise UsageError(f"{name} is {quoted(found)}, and must be {value!r}")
        defaults = {item.name: item.default for item in dataclasses.fields(ModelConfig)}
        fields: dict[str, Any] = dict(self.fixed)
        for own, setting in self.settings.items():
            if own == "activation":
                fields[own] = activation(theirs, setting.theirs, setting.default)
                continue
            kind: Any = type(defaults[own])
            kind = (int, float) if kind is float else kind
            fields[own] = field(
                theirs, setting.theirs, setting.default, kind, aliases=setting.aliases
            )
        if fields["vocab_size"] == 0:
            raise UsageError("vocab_size is 0, and must be at least 1")
        fields["dropout"] = self._dropout(theirs, say)
        return ModelConfig(**(fields | self.others(theirs, fields)))

    def _dropout(self, theirs: dict[str, Any], say: Callable[[str], None]) -> float:
        found = {name: field(theirs, name, self.dropout, (int, float)) for name in self.dropouts}
        each = ", ".join(f"{name} {quoted(value)}" for name, value in found.items())
        if len(found) == 1:
            if set(found.values()) != {0}:
                say(f"{each}: it is not used, because models here have one dropout for all parts")
            return 0.0
        if len(set(found.values())) > 1:
            say(
                f"{each}: models here have only one dropout (used in training), set to "
                f"{self.dropouts[0]}"
            )
        value: float = next(iter(found.values()), 0.0)
        return value

    def others(self, theirs: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are not plain ones. ``fields`` are those that were found already."""
        return {}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse of :meth:`others`, for a resolved configuration."""
        return {}

    def sizes(self, config: ModelConfig) -> list[tuple[str, str, list[int]]]:
        """Tensors from which every size in their ``config.json`` can be checked, except the number
        of layers: the bare name, the fields that the shape depends on, and the shape.
        """
        own = config.resolved()
        V, C, D = own.vocab_size, own.n_embd, own.head_dim
        rows: list[tuple[str, tuple[str, ...], int]] = [
            ("embed.weight", ("vocab_size",), V),
            (
                "blocks.0.attn.qkv.weight",
                ("n_head", "head_dim"),
                (own.n_head + 2 * own.n_kv_head) * D,
            ),
        ]
        if own.position == "learned":
            rows.append(("position.weight", ("context_length",), own.context_length))
        mlp = "blocks.0.mlp"
        if own.n_expert:
            rows.append((f"{mlp}.router.weight", ("n_expert",), own.n_expert))
            mlp += ".experts.0"
        rows.append((f"{mlp}.up.weight", ("n_inner",), own.n_inner))
        found = []
        for name, fields, length in rows:
            part, *others = self.parts(name, config)
            for each in (part, *others):
                if each.rows is not None and each.theirs == part.theirs:
                    length = each.rows.stop if each is part else max(length, each.rows.stop)
            given = [self.settings[each].theirs for each in fields if each in self.settings]
            names = " and ".join([*given, self.settings["n_embd"].theirs])
            shape = [C, length] if part.turn else [length, C]
            shape = [part.stack, *shape] if part.stack else shape
            found.append((part.theirs.removeprefix(self.prefix), names, shape))
        return found

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

    def exported(self, config: ModelConfig) -> dict[str, Any]:
        """The ``config.json`` of a model. ``UsageError`` names the settings that the family cannot
        express.
        """
        theirs = self._written(config)
        if differ := self._differing(config, theirs):
            each = " and ".join(f"model.{name} {getattr(config, name)}" for name in differ)
            raise UsageError(f"Hugging Face's {self.name} cannot express {each}")
        return theirs

    def stored(self, config: ModelConfig) -> ModelConfig:
        """The shape of the model in an exported file. It may have biases that the model lacks; the
        file then has zeros.
        """
        return self.config(self._written(config), say=_QUIET)

    def missing(self, config: ModelConfig) -> list[str]:
        """The fields that the family cannot express."""
        return self._differing(config, self._written(config))

    def _written(self, config: ModelConfig) -> dict[str, Any]:
        own = config.resolved()
        theirs: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **dict.fromkeys(self.dropouts, own.dropout),
        }
        for name, setting in self.settings.items():
            value = getattr(own, name)
            theirs[setting.theirs] = ACTIVATION_NAMES[value] if name == "activation" else value
        return theirs | self.others_of(own)

    def _differing(self, config: ModelConfig, theirs: dict[str, Any]) -> list[str]:
        """The fields in which a model differs from the one of their configuration. Biases that it
        lacks are zeros where files always have them.
        """
        own, found = config.resolved(), []
        try:
            back = self.config(theirs, say=_QUIET).resolved()
        except UsageError:  # the family's own settings contradict the model's
            return [name for name, value in self.fixed.items() if getattr(own, name) != value]
        for name in [item.name for item in dataclasses.fields(own) if item.name not in UNUSED]:
            same = getattr(own, name) == getattr(back, name)
            if name == "window_pattern":
                same = own.layer_pattern() == back.layer_pattern()
            elif name in BIASES:
                same = same or (self.always_biased and own.norm_weight)
            elif name == "dropout":
                same = same or len(self.dropouts) < 2
            elif name in ("rotary_trained_length", "rotary_high_frequency", "rotary_temperature"):
                same = same or own.rotary_scaling == "none"
            elif name == "context_length":
                same = same or (name not in self.settings and own.most_positions() is None)
            if not same:
                found.append(name)
        return found


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
