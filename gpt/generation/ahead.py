"""Several tokens of each row, chosen on the device: the host waits once for all of them.

The device reads the last token of each row, chooses the next one, and stores it, again and again.
On a GPU, all operations of one token are a captured CUDA graph, so that the host launches one thing
per token. Capturing needs no compiler. On other devices, the same operations run one by one.

A graph belongs to one number of rows and to the memory of one cache. Therefore rows are padded to
the next power of two, and a model keeps the cache and its graphs for its next texts.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gpt.config import CacheFormat, GenerationConfig, SamplingConfig
from gpt.generation.sampling import UNKNOWN, choose, marked, penalise
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

MOST = 16
"""Tokens of each row that a GPU chooses before the host waits."""
WORTH_CAPTURING = 32
"""From this many tokens of each row on, a graph is captured; for fewer, the operations run one by
one. A capture runs them twice, records them once, and builds the graph.
"""
ROUNDED = 128
"""A cache's capacity is a multiple of this, up to the context, so that longer texts also fit."""


class TokenLoop:
    """Chooses tokens for the rows of a cache. Holds no model, so that a model can keep it."""

    def __init__(self, cache: KVCache, config: SamplingConfig, *, vocab_size: int) -> None:
        self.cache, self.config, self.vocab_size = cache, config, vocab_size
        self.settings = _settings(config)
        B, device = cache.max_batch_size, cache.device
        self._last = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(MOST, B, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(MOST, B, dtype=torch.int64, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)  # in the two above
        # Made once, with bias and bans: inside a graph, the host sends nothing to the device.
        none = torch.zeros(1, vocab_size, device=device)
        self._bias = penalise(none, config) if config.bias or config.ban else None
        self._graphs: dict[int, Callable[[], object]] = {}  # by padded rows
        self._counts: Counter[int] = Counter()  # tokens of each row, by padded rows
        self._pool: Any = None
        self.addresses: list[object] = []
        """Where the weights were at the first capture: the graphs read them there."""

    def run(
        self,
        model: GPT,
        last: Sequence[int],
        numbers: Sequence[Sequence[float]],
        *,
        expected: int = MOST,
    ) -> list[list[int]] | None:
        """Choose the next ``n`` tokens ``[n][B]`` with the random ``numbers`` ``[n][B]``.

        ``last`` ``[B]`` are the tokens that each row of the cache has not read yet. ``expected``
        tokens of each row are still to come, these included. ``None`` if logits are not numbers.
        """
        n, B = len(numbers), len(last)
        padded = padded_rows(B, self.cache.max_batch_size)
        cache = self.cache.padded(padded)
        choose_next = self._prepare(model, cache, expected=expected)
        self._last[:B].copy_(torch.tensor(last, device="cpu")[:, None])
        self._numbers[:n, :B].copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
        self._index.zero_()
        for _ in range(n):
            choose_next()
        self._counts[padded] += n
        chosen: list[list[int]] = self._chosen[:n, :B].tolist()
        return None if any(UNKNOWN in tokens for tokens in chosen) else chosen

    def _choose_next(self, model: GPT, cache: KVCache) -> None:
        """Read the last token of each row, and store the next one."""
        B = cache.batch_size
        logits = model(self._last[:B], cache=cache)[:, -1, : self.vocab_size]
        if self._bias is not None:
            logits = logits + self._bias
        numbers = self._numbers[:, :B].index_select(0, self._index)[0]
        chosen = choose(logits, self.config, numbers)
        self._chosen[:, :B].index_copy_(0, self._index, marked(chosen, logits)[None])
        self._last[:B].copy_(chosen[:, None])
        self._index += 1

    def _prepare(self, model: GPT, cache: KVCache, *, expected: int) -> Callable[[], object]:
        """:meth:`_choose_next` for all rows of ``cache``, as a graph if a capture is worth it."""
        rows, device = cache.batch_size, cache.device
        if rows not in self._graphs:
            worth = self._counts[rows] + expected >= WORTH_CAPTURING
            if not (worth and can_capture(device)):
                return lambda: self._choose_next(model, cache)
            if self._pool is None:
                self._pool = new_pool()
                self.addresses = addresses(model)
            lengths = cache.lengths
            self._index.zero_()
            graph = capture(lambda: self._choose_next(model, cache), device, self._pool)
            self._graphs[rows] = graph
            cache.lengths = lengths
        return self._graphs[rows]


def padded_rows(rows: int, most: int) -> int:
    """The number of rows of the graph for ``rows`` rows: the next power of two, up to ``most``."""
    return min(1 << (rows - 1).bit_length(), most)


def can_capture(device: torch.device) -> bool:
    """Whether ``device`` captures graphs."""
    return device.type == "cuda"


def new_pool() -> Any:
    """Memory for the intermediate results of graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(call: Callable[[], object], device: torch.device, pool: Any) -> Callable[[], object]:
    """``call`` as a CUDA graph of ``device``, with its intermediate results in ``pool``. ``call``
    first runs twice outside the graph, which must not record what a first call allocates.
    """
    with torch.cuda.device(device):  # streams are the current device's, not the tensors'
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: a checkpoint's writer, another decoder.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()
    return graph.replay


_kept: "WeakKeyDictionary[GPT, TokenLoop]" = WeakKeyDictionary()
"""The loop of each model's latest texts. Not an attribute, since copies and pickles of a model have
no graphs. A decoder takes the loop out while it runs, so that no two decoders share one.
"""


def loop_for(
    model: GPT, config: GenerationConfig, *, rows: int, length: int, vocab_size: int
) -> TokenLoop:
    """A loop over an empty cache with room for ``rows`` rows of ``length`` tokens: the one that
    the model keeps, if it fits.
    """
    length = -(-length // ROUNDED) * ROUNDED
    length = min(model.config.most_positions() or length, length)
    old = _kept.pop(model, None)
    if old is not None and _fits(old, model, config.cache, rows, length):
        old.cache.reorder([])
        if (old.settings, old.vocab_size) == (_settings(config), vocab_size):
            return old
        return TokenLoop(old.cache, config, vocab_size=vocab_size)
    cache = model.new_cache(rows, capacity=length, on_device=True, stored_as=config.cache)
    cache.reorder([])
    return TokenLoop(cache, config, vocab_size=vocab_size)


def keep(model: GPT, loop: TokenLoop) -> None:
    """Keep an unused ``loop`` for the model's next texts, as long as the model lives. A model in
    training keeps none, and no model keeps a cache that is larger than its weights.
    """
    size = loop.cache.nbytes
    if not model.training and size <= sum(tensor.nbytes for tensor in _tensors(model)):
        _kept[model] = loop


def _fits(loop: TokenLoop, model: GPT, stored_as: CacheFormat, rows: int, length: int) -> bool:
    """Whether the cache has room for ``rows`` rows of ``length`` tokens, and the graphs read this
    model's weights. Attention reads the whole capacity, so it may be at most twice ``length``.
    """
    cache = loop.cache
    return (
        rows <= cache.max_batch_size
        and length <= cache.capacity <= 2 * length
        and (cache.stored_as, cache.dtype) == (stored_as, model.cache_dtype or model.dtype)
        and cache.device == model.device
        and (not loop.addresses or loop.addresses == addresses(model))
    )


def addresses(model: GPT) -> list[object]:
    """The address of each weight; a model that was moved or converted has others."""
    return [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in _tensors(model)]


def _tensors(model: GPT) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _settings(config: SamplingConfig) -> dict[str, object]:
    """The settings that the choice of a token depends on."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(SamplingConfig)}
