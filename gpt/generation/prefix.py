"""The shared beginning of prompts: the model reads it once, and they all start from its cache."""

from collections.abc import Sequence
from typing import Protocol

import torch

from gpt.config import CacheFormat
from gpt.generation.logprobs import Describer, Reading, TokenDetails
from gpt.generation.prefill import read
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT

WORTH_SHARING = 8
"""Tokens. A shorter beginning is read again with each prompt."""


class Beginnings(Protocol):
    """What a decoder asks about the beginnings that the model has read."""

    describer: Describer | None
    details: list[TokenDetails]
    """With a ``describer``, those of the shared tokens from the second on."""

    def read_common(self, prompts: list[list[int]], upcoming: list[list[int]]) -> None:
        """Read what ``prompts`` and ``upcoming`` ones begin with, if that is worth it."""

    def origin(self, prompt: Sequence[int]) -> int:
        """The number of the beginning that ``prompt`` goes on from; prompts with the same one are
        read together.
        """

    def new_cache(self, prompts: list[list[int]], *, capacity: int) -> KVCache:
        """A cache of at least this ``capacity`` with a row for each of ``prompts``, which have one
        origin. Each row holds as much as all of them begin with.
        """

    def keep(self, tokens: list[int], cache: KVCache) -> None:
        """Take over a cache of one row in which the model has read ``tokens``."""


class Prefix:
    """The longest beginning that the latest prompts share, in a cache of one row.

    With a ``describer``, its tokens are described as the model reads them. The features of one
    token give the details of the next one, so each prompt reads the last shared token itself.
    """

    def __init__(
        self, model: GPT, describer: Describer | None = None, *, cache: CacheFormat = "float"
    ) -> None:
        self.model, self.describer, self.stored_as = model, describer, cache
        self.details: list[TokenDetails] = []
        """Those of the shared tokens from the second on."""
        self._left = 0 if describer is None else 1  # shared tokens that are not in the cache
        self._tokens: list[int] = []
        self._cache: KVCache | None = None

    def read_common(self, prompts: list[list[int]], upcoming: list[list[int]]) -> None:
        """Read the shared beginning of ``prompts`` and ``upcoming`` ones if much of it is new.

        Equal ``prompts`` need no shared beginning: the decoder reads them once.
        """
        different = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))] + upcoming
        if len(different) == 1:
            return
        # What the first and the last in sorted order begin with, the others begin with too.
        shared = common(min(different)[:-1], max(different)[:-1])
        if len(shared) - len(common(shared, self._tokens)) >= WORTH_SHARING:
            self._tokens = shared
            unread = shared[: len(shared) - self._left]
            self._cache = self.model.new_cache(1, capacity=len(unread), stored_as=self.stored_as)
            ids = torch.tensor([unread], device=self.model.device)
            if self.describer is None:
                read(self.model, ids, self._cache)
            else:
                reading = Reading(self.describer, [shared])
                read(self.model, ids, self._cache, each=reading.add)
                [self.details] = reading.found

    def origin(self, prompt: Sequence[int]) -> int:
        """There is one."""
        return 0

    def keep(self, tokens: list[int], cache: KVCache) -> None:
        """Take over a cache of one row in which the model has read ``tokens``."""
        self._tokens, self._cache = tokens, cache

    def new_cache(self, prompts: list[list[int]], *, capacity: int) -> KVCache:
        """A cache of at least this ``capacity`` with a row for each of ``prompts``. Each row holds
        as much of the prefix as all the prompts begin with.
        """
        known = min(len(common(prompt[:-1], self._tokens)) for prompt in prompts) - self._left
        if (
            self._cache is None
            or known < WORTH_SHARING
            or not self._cache.can_truncate([known])  # a ring has forgotten what is before
        ):
            return self.model.new_cache(len(prompts), capacity=capacity, stored_as=self.stored_as)
        cache = self._cache.expand(len(prompts), capacity=max(capacity, self._cache.length))
        cache.truncate(known)
        return cache


def common(one: list[int], two: list[int]) -> list[int]:
    """The beginning that both lists share."""
    n = min(len(one), len(two))
    return one[: next((i for i in range(n) if one[i] != two[i]), n)]
