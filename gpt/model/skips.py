"""Skip connections around blocks: from the first block's input to each, and from the first half of
the blocks to the second (U-net, arXiv:1505.04597). https://github.com/KellerJordan/modded-nanogpt
has both in a language model.

Their weights begin so that the model is the one without them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.shared import Shared


class Skips(nn.Module):
    """Runs the blocks. With ``skip_embedding``, the stream ``x`` becomes
    ``stream[l] x + start[l] x0`` before block ``l``. With ``skip_layers``, block ``L - 1 - i`` also
    reads ``across[i]`` times the output of block ``i``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = config.n_layer if config.skip_embedding else 0
        half = config.n_layer // 2 if config.skip_layers else 0
        self.stream = nn.Parameter(torch.ones(n)) if n else None
        self.start = nn.Parameter(torch.zeros(n)) if n else None
        self.across = nn.Parameter(torch.zeros(half)) if half else None

    @torch.no_grad()
    def reset(self) -> None:
        """Weights with which the connections add nothing."""
        if self.stream is not None and self.start is not None:
            self.stream.fill_(1)
            self.start.zero_()
        if self.across is not None:
            self.across.zero_()

    def forward(self, x: Tensor, blocks: Iterable[nn.Module], shared: Shared) -> Tensor:
        """``[B, T, C]`` through all blocks."""
        first, modules = x, list(blocks)
        outputs: list[Tensor] = []
        for layer, block in enumerate(modules):
            if self.stream is not None and self.start is not None:
                stream, start = self.stream[layer].to(x.dtype), self.start[layer].to(x.dtype)
                x = stream * x + start * first
            back = len(modules) - 1 - layer
            if self.across is not None and back < len(self.across):
                x = x + self.across[back].to(x.dtype) * outputs[back]
            x = block(x, shared)
            if self.across is not None and layer < len(self.across):
                outputs.append(x)
        return x
