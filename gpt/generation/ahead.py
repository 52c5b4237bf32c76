"""Some steps of decoding that the device takes alone: the host waits once for all of them.

Each step reads the last token of each row, chooses the next one, and keeps it, all on the device.
On a GPU a step is one captured CUDA graph, so the host launches one thing a token; capturing it
takes no compiler. Elsewhere the same steps run one operation after the other.

A graph is of one number of rows and of one cache's memory. So rows are padded to the next power of
two, and the cache and its graphs are kept for the model's next texts.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gpt.config import SamplingConfig
from gpt.generation.sampling import UNKNOWN, choose, marked, penalise
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

MOST = 16
"""Steps that are taken at once on a GPU."""
WORTH_CAPTURING = 32
"""Steps of one number of rows. Fewer run one operation after the other: a capture runs the step
twice, records it once, and builds the graph.
"""
ROUNDED = 128
"""A cache's capacity is a multiple of this where the context allows, so that longer texts fit it
too.
"""


class Steps:
    """The steps of a cache's rows. They hold no model, so that they can be kept with one."""

    def __init__(self, cache: KVCache, config: SamplingConfig, *, vocab_size: int) -> None:
        self.cache, self.config, self.vocab_size = cache, config, vocab_size
        self.settings = _settings(config)
        B, device = cache.max_batch_size, cache.device
        self._tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(MOST, B, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(MOST, B, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        # Bias and bans, made once: nothing goes from the host to the device within a step.
        none = torch.zeros(1, vocab_size, device=device)
        self._bias = penalise(none, config) if config.bias or config.ban else None
        self._graphs: dict[int, Callable[[], object]] = {}  # by padded rows
        self._taken: Counter[int] = Counter()
        self._pool: Any = None
        self.places: list[object] = []
        """Where the weights were that the graphs read."""

    def take(
        self,
        model: GPT,
        tokens: Sequence[int],
        numbers: Sequence[Sequence[float]],
        *,
        expected: int = MOST,
    ) -> list[list[int]] | None:
        """Read ``tokens`` ``[B]``, one for each row of the cache, and then what is chosen: as many
        steps as ``numbers`` ``[n][B]`` has. The tokens ``[n][B]``; ``None`` if logits were no
        numbers. ``expected`` steps, these included, are to come.
        """
        n, B = len(numbers), len(tokens)
        padded = padded_rows(B, self.cache.max_batch_size)
        cache = self.cache.padded(padded)
        once = self._once(model, cache, expected=expected)
        self._tokens[:B].copy_(torch.tensor(tokens)[:, None])
        self._numbers[:n, :B].copy_(torch.tensor(numbers, dtype=torch.float64))
        self._step.zero_()
        for _ in range(n):
            once()
        self._taken[padded] += n
        chosen: list[list[int]] = self._chosen[:n, :B].tolist()
        return None if any(UNKNOWN in step for step in chosen) else chosen

    def _take(self, model: GPT, cache: KVCache) -> None:
        B = cache.batch_size
        logits = model(self._tokens[:B], cache=cache)[:, -1, : self.vocab_size]
        if self._bias is not None:
            logits = logits + self._bias
        numbers = self._numbers[:, :B].index_select(0, self._step)[0]
        chosen = choose(logits, self.config, numbers)
        self._chosen[:, :B].index_copy_(0, self._step, marked(chosen, logits)[None])
        self._tokens[:B].copy_(chosen[:, None])
        self._step += 1

    def _once(self, model: GPT, cache: KVCache, *, expected: int) -> Callable[[], object]:
        """What takes one step of all rows of ``cache``."""
        rows, device = cache.batch_size, cache.device
        if rows not in self._graphs:
            worth = self._taken[rows] + expected >= WORTH_CAPTURING
            if not (worth and can_capture(device)):
                return lambda: self._take(model, cache)
            if self._pool is None:
                self._pool = new_pool()
                self.places = places(model)
            lengths = cache.lengths
            self._step.zero_()
            self._graphs[rows] = capture(lambda: self._take(model, cache), device, self._pool)
            cache.lengths = lengths
        return self._graphs[rows]


def padded_rows(rows: int, most: int) -> int:
    """The rows of the graph for ``rows`` rows: the next power of two, or all ``most`` that there is
    memory for.
    """
    return min(1 << (rows - 1).bit_length(), most)


def can_capture(device: torch.device) -> bool:
    """Whether steps can become graphs there."""
    return device.type == "cuda"


def new_pool() -> Any:
    """Memory for the intermediate results of graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(step: Callable[[], object], device: torch.device, pool: Any) -> Callable[[], object]:
    """``step`` as a CUDA graph of ``device``, with its intermediate results in ``pool``. It runs
    twice before: what is made at a first call is not for the graph.
    """
    with torch.cuda.device(device):  # streams are the current device's, not the tensors'
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: a checkpoint's writer, another decoder.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay


_kept: "WeakKeyDictionary[GPT, Steps]" = WeakKeyDictionary()
"""Of each model the steps of its last texts. Not an attribute: copies and pickles of a model have
no graphs. Who decodes takes them away, so no two ever use the same ones.
"""


def steps_for(
    model: GPT, config: SamplingConfig, *, rows: int, length: int, vocab_size: int
) -> Steps:
    """Steps over an empty cache that has room for ``rows`` rows of ``length`` tokens: the ones that
    were kept, where they fit.
    """
    length = min(model.config.context_length, -(-length // ROUNDED) * ROUNDED)
    old = _kept.pop(model, None)
    if old is not None and _fits(old, model, rows, length):
        old.cache.reorder([])
        if (old.settings, old.vocab_size) == (_settings(config), vocab_size):
            return old
        return Steps(old.cache, config, vocab_size=vocab_size)
    cache = model.new_cache(rows, capacity=length, on_device=True)
    cache.reorder([])
    return Steps(cache, config, vocab_size=vocab_size)


def keep(model: GPT, steps: Steps) -> None:
    """Keep ``steps``, which nobody uses any more, for the model's next texts and as long as it
    lives. Not of a model in training, nor a cache that takes more memory than the weights.
    """
    size = steps.cache.nbytes
    if not model.training and size <= sum(tensor.nbytes for tensor in _tensors(model)):
        _kept[model] = steps


def _fits(steps: Steps, model: GPT, rows: int, length: int) -> bool:
    """Whether the cache has the room, at most twice of what is needed (attention reads it all), and
    the graphs the weights.
    """
    cache = steps.cache
    return (
        rows <= cache.max_batch_size
        and length <= cache.capacity <= 2 * length
        and cache.dtype == (model.cache_dtype or model.dtype)
        and cache.device == model.device
        and (not steps.places or steps.places == places(model))
    )


def places(model: GPT) -> list[object]:
    """Where each of the weights lies: of a model that was moved or converted, elsewhere."""
    return [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in _tensors(model)]


def _tensors(model: GPT) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _settings(config: SamplingConfig) -> dict[str, object]:
    """What a step depends on."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(SamplingConfig)}
