"""Options of adapters: a few new weights over a model whose own ones stay as they are."""

from dataclasses import dataclass, fields
from typing import Literal

from gpt.config.checks import UsageError, check, number

AdapterKind = Literal["none", "lora", "bottleneck"]
LORA_ONLY = ("alpha", "targets", "rank_stabilised")
"""Settings that a bottleneck has no use for."""
RoundedBase = Literal["bfloat16", "int8", "int4"]
AdapterBase = Literal["float32", "bfloat16", "int8", "int4", "gguf"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A small adapter that is trained instead of the model's own weights. Needs init."""

    kind: AdapterKind = "none"
    """lora: a product of two thin matrices is added to each target (Hu et al., 2021); bottleneck:
    a narrow layer behind attention and feed-forward layer (Houlsby et al., 2019)."""
    rank: int = number(8, at_least=1)
    """Rank of lora's products; width of a bottleneck."""
    alpha: float = number(16.0, above=0)
    """lora's products are scaled by alpha / rank."""
    dropout: float = number(0.0, at_least=0, below=1)
    """Dropout of the adapter's input."""
    targets: tuple[str, ...] = ("attn.*",)
    """Patterns of the linear layers that lora adapts, by their names in a block (attn.qkv) or in
    the model (blocks.0.mlp.up). A bottleneck is always behind attn.out and mlp.down."""
    rank_stabilised: bool = False
    """Scale lora's products by alpha / sqrt(rank) (Kalajdzievski, 2023)."""
    base: AdapterBase = "float32"
    """Format of the blocks' own weights while the adapter is trained. bfloat16, int8 and int4 round
    them, and need less memory; with training.precision bfloat16, the first changes nothing. gguf:
    the blocks of a GGUF file as they are, which loses nothing."""

    def __post_init__(self) -> None:
        check(self, "adapter.")
        if not self.targets:
            raise UsageError("adapter.targets is empty, and needs a pattern such as attn.*")
        unused = {"lora": (), "bottleneck": LORA_ONLY, "none": None}[self.kind]
        for item in fields(self):
            value = getattr(self, item.name)
            is_unused = item.name != "kind" if unused is None else item.name in unused
            if is_unused and value != item.default:
                needs = "lora" if item.name in LORA_ONLY else "lora or bottleneck"
                shown = " ".join(value) if isinstance(value, tuple) else value
                raise UsageError(
                    f"adapter.{item.name} is {shown}, and adapter.kind is {self.kind}; it needs "
                    f"{needs}"
                )

    @property
    def scale(self) -> float:
        """The factor of lora's products."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
