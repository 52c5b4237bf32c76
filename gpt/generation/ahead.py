"""Some steps of decoding that the device takes alone: the host waits once for all of them.

Each step reads the last token of each row, chooses the next one, and keeps it, all on the device.
On a GPU a step is one captured CUDA graph, so the host launches one thing a token; capturing it
takes no compiler. Elsewhere the same steps run one operation after the other.
"""

from collections.abc import Callable, Sequence

import torch

from gpt.config import SamplingConfig
from gpt.generation.sampling import choose, penalise
from gpt.model.cache import StaticCache
from gpt.model.gpt import GPT

MOST = 16
"""Steps that are taken at once on a GPU."""


class Steps:
    """The steps of ``B`` rows that ``cache`` has, as often as they are wanted."""

    def __init__(
        self, model: GPT, cache: StaticCache, config: SamplingConfig, *, vocab_size: int
    ) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.vocab_size = vocab_size
        B, device = cache.batch_size, cache.keys.device
        self._tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(MOST, B, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(MOST, B, dtype=torch.int64, device=device)
        self._are_numbers = torch.ones((), dtype=torch.bool, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        # Bias and bans, made once: nothing goes from the host to the device within a step.
        none = torch.zeros(1, vocab_size, device=device)
        self._bias = penalise(none, config) if config.bias or config.ban else None
        self._once: Callable[[], object] = self._take
        if device.type == "cuda":
            self._once = self._captured()

    def take(
        self, tokens: Sequence[int], numbers: Sequence[Sequence[float]]
    ) -> list[list[int]] | None:
        """Read ``tokens`` ``[B]``, and then what is chosen: as many steps as ``numbers`` ``[n][B]``
        has. The tokens ``[n][B]``; ``None`` if logits were no numbers.
        """
        n = len(numbers)
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        self._numbers[:n].copy_(torch.tensor(numbers, dtype=torch.float64))
        self._step.zero_()
        self._are_numbers.fill_(True)
        for _ in range(n):
            self._once()
        chosen: list[list[int]] = self._chosen[:n].tolist()
        return chosen if self._are_numbers else None

    def _take(self) -> None:
        logits = self.model(self._tokens, cache=self.cache)[:, -1, : self.vocab_size]
        if self._bias is not None:
            logits = logits + self._bias
        self._are_numbers &= logits.amax(dim=-1).isfinite().all()
        numbers = self._numbers.index_select(0, self._step)[0]
        chosen = choose(logits, self.config, numbers)
        self._chosen.index_copy_(0, self._step, chosen[None])
        self._tokens.copy_(chosen[:, None])
        self._step += 1

    def _captured(self) -> Callable[[], object]:
        """The step as a CUDA graph; the cache stays as long as it is."""
        lengths = self.cache.lengths
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at a first call is not for the graph
            for _ in range(2):
                self._take()
                self.cache.truncate(lengths)
                self._step.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._take()
        self.cache.truncate(lengths)
        return graph.replay
