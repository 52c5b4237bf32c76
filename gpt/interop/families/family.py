"""A family of models as a table, which is read forward to load a model and backward to export one.

A family's file says what all its models have in common (``fixed``), which fields of their
``config.json`` hold the other settings (``settings``). What is no plain field is a method:
:meth:`Family.others` and its inverse :meth:`Family.others_of`. The names of modules are in
:mod:`gpt.interop.families.tensors`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gpt.config import Activation, ModelConfig, UsageError, quoted
from gpt.interop.families.fields import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    OTHER_NAMES,
    activation,
    check_not_quantised,
    field,
)
from gpt.interop.families.rope import scaling_names
from gpt.interop.families.tensors import Tensors

UNUSED = {"initial", "moe_capacity", "moe_balance", "moe_balance_weight", "moe_z_weight"}
"""Fields that do not matter for a finished model."""
BIASES = {"bias", "norm_bias", "qkv_bias", "mlp_bias"}
"""Fields of biases."""
_QUIET: Callable[[str], None] = lambda text: None  # noqa: E731


@dataclass(frozen=True)
class Setting:
    """A field of their ``config.json`` that holds a field of :class:`ModelConfig`."""

    theirs: str
    default: Any
    """Of a file without the field, as in ``transformers``."""
    aliases: tuple[str, ...] = ()
    """Other names that their configuration accepts."""
    null: Any = None
    """What ``null`` means; ``None``: the default."""


class Family(Tensors):
    """One ``model_type`` of Hugging Face's ``config.json``."""

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
    activations: ClassVar[Mapping[str, Activation]] = ACTIVATIONS
    """Their names of activations."""
    always_biased: ClassVar[bool] = False
    """Whether all linear layers and norms have biases in a file."""

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
            name, default = setting.theirs, setting.default
            if setting.null is not None and name in theirs:
                default = setting.null
            if own == "activation":
                fields[own] = activation(theirs, name, default, self.activations)
            else:
                kind = type(defaults[own])
                fields[own] = field(theirs, name, default, kind, aliases=setting.aliases)
        if fields["vocab_size"] == 0:
            raise UsageError("vocab_size is 0, and must be at least 1")
        fields["dropout"] = self._dropout(theirs, say)
        fields |= self.others(theirs, fields)
        try:
            return ModelConfig(**fields)
        except UsageError as error:
            raise UsageError(self._with_their_names(str(error), fields)) from None

    def _with_their_names(self, message: str, fields: Mapping[str, Any]) -> str:
        """A message about ``fields`` of :class:`ModelConfig` with the names of the file's."""
        names = {**OTHER_NAMES, **scaling_names(fields.get("rotary_scaling", "none"))}
        names |= {own: setting.theirs for own, setting in self.settings.items()}
        names |= {"dropout": self.dropouts[0]} if self.dropouts else {}
        return re.sub(r"model\.(\w+)", lambda match: names.get(match[1], match[0]), message)

    def _dropout(self, theirs: dict[str, Any], say: Callable[[str], None]) -> float:
        found = {name: field(theirs, name, self.dropout, float) for name in self.dropouts}
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
            theirs[setting.theirs] = self._activation(value) if name == "activation" else value
        return theirs | self.others_of(own)

    def _activation(self, own: Activation) -> str:
        """Their name of an activation; one that they do not have keeps its own name."""
        usual = ACTIVATION_NAMES[own]
        if self.activations.get(usual) == own:
            return usual
        return next((name for name, each in self.activations.items() if each == own), own)

    def _differing(self, config: ModelConfig, theirs: dict[str, Any]) -> list[str]:
        """The fields in which a model differs from the one of their configuration. Biases that it
        lacks are zeros where files always have them.
        """
        own, found = config.resolved(), []
        try:
            back = self.config(theirs, say=_QUIET).resolved()
        except UsageError:  # the family's own settings contradict the model's
            fixed = [name for name, value in self.fixed.items() if getattr(own, name) != value]
            has_activation = own.activation in self.activations.values()
            return fixed if has_activation else [*fixed, "activation"]
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
