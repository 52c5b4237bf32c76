"""What differs from layer to layer: which earlier tokens a layer sees, and its rotary base."""

import dataclasses
from dataclasses import dataclass

from gpt.config import ModelConfig
from gpt.model.masks import MaskRule, blocks, causal, window


@dataclass(frozen=True)
class Kind:
    """Layers that share masks, rotations and the shape of their caches."""

    letter: str = "G"
    """As in ``window_pattern``."""
    rotary_base: float = 10_000.0
    rotary_scaled: bool = True
    """Whether the scaling of rotary positions applies to these layers."""
    window: int | None = None
    """The attention window in tokens, if the layers have one."""
    sinks: int = 0
    """First tokens that are seen beside the window."""
    rule: MaskRule = causal
    """Which keys a query sees."""

    @property
    def most_keys(self) -> int | None:
        """How many keys a query sees at most; ``None`` if there is no limit."""
        if isinstance(self.rule, blocks):
            return self.rule.size * (self.rule.local + self.rule.first + self.rule.random)
        return self.window and self.window + self.sinks

    @property
    def last_to_sinks(self) -> int | None:
        """The position from which a query looks at sinks when its own is larger, so that sinks stay
        right before the window (StreamingLLM, arXiv:2309.17453).
        """
        return self.sinks + self.window - 1 if self.sinks and self.window else None


def layer_kinds(config: ModelConfig) -> list[Kind]:
    """The kind of each layer. Equal kinds are one object."""
    config = config.resolved()
    sparse = blocks(
        config.sparse_block, config.sparse_local, config.sparse_global, config.sparse_random
    )
    local = window(config.window, config.sinks) if config.window else causal
    kinds = {
        "G": Kind("G", config.rotary_base),
        "L": Kind(
            "L",
            config.rotary_base_local,
            config.rotary_scaling_local,
            config.window,
            config.sinks,
            local,
        ),
        "S": Kind("S", config.rotary_base, rule=sparse),
    }
    return [kinds[letter] for letter in config.layer_pattern()]


def narrowed(kind: Kind, limit: int) -> Kind:
    """The kind with an attention window of at most ``limit`` tokens; 0: as it is. Sparse layers
    keep their blocks.
    """
    if not limit or isinstance(kind.rule, blocks) or (kind.window or limit + 1) <= limit:
        return kind
    return dataclasses.replace(kind, window=limit, rule=window(limit, kind.sinks))
