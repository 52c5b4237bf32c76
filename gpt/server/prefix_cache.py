"""What earlier requests began with, in caches of one row: a conversation's next turn reads only
what is new, and a system prompt that many requests share is read once.

The memory has a bound. What was not used for the longest time goes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.config import CacheFormat
from gpt.generation.logprobs import Describer, TokenDetails
from gpt.generation.prefill import evaluation_mode, read
from gpt.generation.prefix import WORTH_SHARING, common
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

MOST_ENTRIES = 256
Ids = NDArray[np.int64]


@dataclass(eq=False)
class _Entry:
    number: int
    tokens: Ids
    cache: KVCache

    def known(self, tokens: Ids) -> int:
        """How many of the ``tokens`` are in the cache."""
        n = min(len(tokens), len(self.tokens))
        differ = np.flatnonzero(tokens[:n] != self.tokens[:n])
        n = int(differ[0]) if len(differ) else n
        return n if self.cache.can_truncate([n]) else 0  # a ring has forgotten what is before


class PrefixCache:
    """Beginnings of texts that the model has read, for a decoder (:class:`Beginnings`)."""

    describer: Describer | None = None

    def __init__(self, model: GPT, most_bytes: int, *, stored_as: CacheFormat = "float") -> None:
        self.model, self.most_bytes, self.stored_as = model, most_bytes, stored_as
        self.details: list[TokenDetails] = []
        self.tokens_read = 0
        """Tokens that were read into entries alone, for the count of what the model reads."""
        self._entries: dict[int, _Entry] = {}  # the one that was used last is at the end
        self._count = 0
        self.nbytes = 0
        """Memory in use. Other threads may read it."""

    def has_room(self, length: int) -> bool:
        """Whether a text of so many tokens can be kept."""
        cache = KVCache(
            self.model.config,
            batch_size=1,
            capacity=length,
            dtype=self.model.cache_dtype or self.model.dtype,
            device="meta",
            stored_as=self.stored_as,
        )
        return cache.nbytes <= self.most_bytes

    def known(self, prompt: Sequence[int]) -> int:
        """How many tokens of ``prompt`` need not be read; the last one always is."""
        return self._best(prompt)[1]

    def origin(self, prompt: Sequence[int]) -> int:
        """The number of the entry that ``prompt`` goes on from; 0 for none."""
        entry, _ = self._best(prompt)
        return 0 if entry is None else entry.number

    def _best(self, prompt: Sequence[int]) -> tuple[_Entry | None, int]:
        unread = np.array(prompt[:-1], np.int64)
        found = max(
            ((entry.known(unread), entry.number) for entry in self._entries.values()),
            default=(0, 0),
        )
        if found[0] < WORTH_SHARING:
            return None, 0
        return self._entries[found[1]], found[0]

    def new_cache(self, prompts: list[list[int]], *, capacity: int) -> KVCache:
        """A cache of at least this ``capacity`` with a row for each of ``prompts``, which have one
        origin.
        """
        entry, _ = self._best(prompts[0])
        known = (
            0 if entry is None else min(entry.known(np.array(p[:-1], np.int64)) for p in prompts)
        )
        if entry is None or known < WORTH_SHARING:
            return self.model.new_cache(len(prompts), capacity=capacity, stored_as=self.stored_as)
        self._entries[entry.number] = self._entries.pop(entry.number)
        capacity = max(capacity, entry.cache.length)
        cache = entry.cache.expand(len(prompts), capacity=capacity)
        cache.truncate(known)
        return cache

    def keep(self, tokens: list[int], cache: KVCache) -> None:
        """Take over a cache of one row in which the model has read ``tokens``. It replaces entries
        that have only a beginning of them.
        """
        if cache.nbytes > self.most_bytes or len(tokens) < WORTH_SHARING:
            return
        self._count += 1
        new = _Entry(self._count, np.array(tokens, np.int64), cache)
        for old in list(self._entries.values()):
            if old.known(new.tokens) == len(tokens):
                return
            if new.known(old.tokens) == len(old.tokens):
                self._drop(old.number)
        self._entries[new.number] = new
        self.nbytes += cache.nbytes
        while self.nbytes > self.most_bytes or len(self._entries) > MOST_ENTRIES:
            self._drop(next(iter(self._entries)))

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).cache.nbytes

    def read_common(self, prompts: list[list[int]], upcoming: list[list[int]]) -> None:
        """Read what several different prompts begin with, if much of it is new."""
        different = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
        if len(different) > 1:
            shared = common(min(different)[:-1], max(different)[:-1])
            if len(shared) - self.known([*shared, 0]) >= WORTH_SHARING:
                self.read_part([*shared, 0], len(shared))

    @torch.inference_mode()
    def read_part(self, prompt: list[int], n: int) -> bool:
        """Read up to ``n`` more tokens of ``prompt``, but not its last one. Returns whether they
        were kept.
        """
        known = self.known(prompt)
        end = min(known + n, len(prompt) - 1)
        cache = self.new_cache([prompt], capacity=len(prompt))
        ids = torch.tensor([prompt[cache.length : end]], device=self.model.device)
        with evaluation_mode(self.model):
            read(self.model, ids, cache)
        self.tokens_read += ids.numel()
        self.keep(prompt[:end], cache)
        return self.known(prompt) >= end
