"""The KV cache: what every layer computed for the tokens already seen, so that none is run twice.

A plain object that is passed to ``GPT.forward``, never a buffer of the model. Its memory is taken
once, and its length is a Python ``int``: nothing waits on the device to read it. Per token it holds
``2 * n_layer * kv_heads * head_dim`` numbers (GPT-2's smallest: 18,432, or 36 KiB in bfloat16).

The law: for every variant and every chunking, decoding with the cache gives the full forward's
logits.
"""

from typing import Self

import torch
from torch import Tensor

from gpt.config import ModelConfig


class KVCache:
    """Keys and values of ``batch_size`` sequences of one common length, up to ``capacity``
    tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """``capacity`` is the model's ``context_length`` unless given (it cannot be more)."""
        capacity = config.context_length if capacity is None else capacity
        if not 0 < capacity <= config.context_length:
            raise ValueError(
                f"the cache's capacity is {capacity}, and must be from 1 to the model's "
                f"context_length ({config.context_length})"
            )
        shape = (config.n_layer, batch_size, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # L, B, Hkv, capacity, D
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence may have."""
        return self.keys.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, each ``[B, Hkv, T, D]``, behind the ones it holds.

        Returns all of the layer's, new ones included, as views ``[B, Hkv, length + T, D]``. The
        length itself moves only with :meth:`advance`, once every layer has appended.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens, and {k.shape[2]} more "
                "do not fit"
            )
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, n: int) -> None:
        """Count the ``n`` tokens that every layer has appended. ``GPT.forward``, and only it, calls
        this.
        """
        self.length += n

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on. Costs nothing."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; ``rows`` ``[B]`` of int64 (a beam's
        parents).
        """
        if rows.shape != (self.batch_size,):
            raise ValueError(f"rows is of {list(rows.shape)}, and must name {self.batch_size} rows")
        for memory in (self.keys, self.values):
            used = memory[:, :, :, : self.length]
            used.copy_(used.index_select(1, rows))

    def expand(self, n: int) -> Self:
        """A new cache with each sequence ``n`` times, side by side: one prefill, ``n``
        continuations.
        """
        if n < 1:
            raise ValueError(f"cannot expand a cache by {n}")
        other = object.__new__(type(self))
        L, B, H, S, D = self.keys.shape
        other.keys, other.values = (
            m.new_empty(L, B * n, H, S, D) for m in (self.keys, self.values)
        )
        other.length = self.length
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            its[:, :, :, : self.length] = mine[:, :, :, : self.length].repeat_interleave(n, dim=1)
        return other
