"""What differs from layer to layer: which earlier tokens a layer sees, and its rotary base."""

from dataclasses import dataclass

from gpt.config import ModelConfig
from gpt.model.masks import MaskRule, blocks, causal, window


@dataclass(frozen=True)
class Kind:
    """Layers that share masks, rotations and the shape of their caches."""

    letter: str = "G"
    """As in ``window_pattern``."""
    rotary_base: float = 10_000.0
    window: int | None = None
    """The attention window in tokens, if the layers have one."""
    sinks: int = 0
    """First tokens that are seen beside the window."""
    rule: MaskRule = causal
    """Which keys a query sees."""


def layer_kinds(config: ModelConfig) -> list[Kind]:
    """The kind of each layer. Equal kinds are one object."""
    config = config.resolved()
    sparse = blocks(
        config.sparse_block, config.sparse_local, config.sparse_global, config.sparse_random
    )
    local = window(config.window, config.sinks) if config.window else causal
    kinds = {
        "G": Kind("G", config.rotary_base),
        "L": Kind("L", config.rotary_base_local, config.window, config.sinks, local),
        "S": Kind("S", config.rotary_base, rule=sparse),
    }
    return [kinds[letter] for letter in config.window_pattern]
