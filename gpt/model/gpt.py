"""GPT: a decoder-only transformer, as GPT-2 has it (Radford et al., 2019).

Tokens and positions are embedded, go through the blocks and a last norm, and the head gives a logit
for each token of the vocabulary to come next. One forward serves training and decoding: training
passes no cache and pays nothing for its existence.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import CacheFormat, ModelConfig
from gpt.model.block import RESIDUALS, Block
from gpt.model.cache import KVCache
from gpt.model.documents import documents_of
from gpt.model.dropout import Dropout
from gpt.model.flex import block_mask, block_mask_of_documents, serves
from gpt.model.flops import flops_per_token
from gpt.model.head import apply_head
from gpt.model.initial import reset, table
from gpt.model.kinds import layer_kinds, narrowed
from gpt.model.norm import make_norm
from gpt.model.pointer import Pointer
from gpt.model.position import POSITIONS
from gpt.model.shared import Shared, view
from gpt.model.skips import Skips
from gpt.model.store import Slots


class GPT(nn.Module):
    """A GPT of the shape that ``config`` gives, with new weights (``config.initial``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        for name in ("vocab_size", "context_length"):
            if getattr(config, name) < 1:
                raise ValueError(f"model.{name} is 0, and a model needs at least 1")
        self.config = config
        self.kinds = list(dict.fromkeys(layer_kinds(config)))
        self.cache_dtype: torch.dtype | None = None
        """Of keys and values; ``None``: the weights'."""
        self.window_limit = 0
        """In training, no attention window is larger than this many tokens; 0: no limit."""
        # Discard the random numbers that modules draw for themselves, so that initialise() depends
        # only on the seed.
        with torch.random.fork_rng(devices=[]):
            self.embed = table(torch.empty(config.vocab_size, config.n_embd))
            self.position = POSITIONS[config.position](config)
            self.embed_norm = make_norm(config) if config.embedding_norm else nn.Identity()
            self.dropout = Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            has_norm = RESIDUALS[config.norm_placement].final_norm
            self.norm = make_norm(config) if has_norm else nn.Identity()
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.pointer = Pointer(config) if config.copy == "pointer" else None
            has_skips = config.skip_embedding or config.skip_layers
            self.skips = Skips(config) if has_skips else None
        self.tie_weights()
        if not self.embed.weight.is_meta:
            self.initialise()

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        valid: Sequence[int] | None = None,
        last_only: bool = False,
        documents: Tensor | None = None,
        read: "Read | None" = None,
    ) -> Tensor:
        """The logits of the token after each of ``tokens``: ``[B, T]`` of int64 to ``[B, T, V]``.

        With a ``cache``, ``tokens`` continue the ones that it holds, and are added to it; of each
        row the first ``valid`` ones, where the rest are padding. ``last_only`` gives the logits of
        the last position, ``[B, 1, V]``.

        ``documents`` ``[B, T]`` marks the document of each token: neighbours with equal marks are
        of the same one. Each document gets the logits that it has alone: its positions start at 0,
        and attention stays inside it.

        With ``read``, the result is what it makes of the model and its features, in place of the
        logits.

        Raises ``ValueError`` past ``context_length`` where positions are learned, past the cache's
        capacity, and for ``documents`` with a cache.
        """
        x = self.features(tokens, cache=cache, valid=valid, documents=documents)
        if read is not None:
            return read(self, x)
        return self.logits(x[:, -1:] if last_only else x)

    def features(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        valid: Sequence[int] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The input of :meth:`logits`, ``[B, T, C]``, for callers that need those of a few
        positions; with ``copy`` ``[B, T, C + 1 + V]``.

        ``forward`` is ``logits(features(tokens))``, and takes the same arguments.
        """
        shared = self.new_shared(tokens, cache, valid, documents)
        x = self.dropout(self.embed_tokens(tokens, shared.at))
        if self.skips is not None:
            x = self.skips(x, self.blocks, shared)
        else:
            for block in self.blocks:
                x = block(x, shared)
        out: Tensor = self.norm(x)
        if self.pointer is not None:
            out = self.pointer(out, tokens, shared)
        if cache is not None:
            assert shared.plan is not None
            cache.advance(shared.plan)
        return out

    def logits(self, features: Tensor) -> Tensor:
        """Features, ``[..., C]``, to logits ``[..., V]``; with ``copy`` to log-probabilities."""
        width, cap = self.config.n_embd, self.config.logit_softcap
        x = features if self.pointer is None else features[..., :width].to(self.dtype)
        logits = apply_head(self.head, x)
        if cap and self.config.logit_softcap_form == "root":
            logits = logits * (1 + (logits / cap).square()).rsqrt()
        elif cap:
            logits = cap * (logits / cap).tanh()
        if self.pointer is not None:
            logits = self.pointer.mix(logits, features[..., width:])
        return logits

    def new_shared(
        self,
        tokens: Tensor,
        cache: KVCache | None,
        valid: Sequence[int] | None = None,
        documents: Tensor | None = None,
    ) -> Shared:
        """What all layers need to know of the forward of ``tokens`` ``[B, T]``."""
        T, most = tokens.shape[1], self.config.most_positions()
        if documents is not None and cache is not None:
            raise ValueError("a cache holds one document in each row, and documents were given")
        plan = None if cache is None else cache.plan(T, valid)
        rows = None if documents is None else documents_of(documents, self.config.n_head)
        if plan is not None:
            at, end, slots = plan.at, plan.new.end, plan.slots
        elif most is not None and most < T:
            raise ValueError(f"{T} tokens are longer than the model's context_length ({most})")
        else:
            at, end = torch.arange(T, device=tokens.device) if rows is None else rows.at, T
            alone = Slots(at, is_square=rows is None, sees_all=False, to=slice(0, T))
            slots = dict.fromkeys(self.kinds, alone)
        several = rows is not None
        limit = self.window_limit if self.training and plan is None else 0
        seen = {kind: narrowed(kind, limit) for kind in self.kinds}
        flex = {
            kind: block_mask(own.rule, T, at.device)
            if rows is None
            else block_mask_of_documents(own.rule, rows.number)
            for kind, own in seen.items()
            if plan is None
            and serves(self.config, own, at, training=self.training, documents=several)
        }
        dtype = self._score_dtype()
        views = {
            kind: view(
                self.position,
                own,
                at,
                slots[kind],
                end=end,
                dtype=dtype,
                flex=flex.get(kind),
                documents=rows,
            )
            for kind, own in seen.items()
        }
        return Shared(at, views, cache, plan, rows, tokens)

    def _score_dtype(self) -> torch.dtype:
        """What attention computes its scores in, most of the time."""
        kind = self.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.cache_dtype or self.dtype

    def embed_tokens(self, tokens: Tensor, at: Tensor) -> Tensor:
        """The first block's input, ``[B, T, C]``, of ``tokens`` at the positions ``at``."""
        x = self.embed(tokens)
        if self.config.scale_embeddings:
            x = x * self.config.n_embd**0.5
        out: Tensor = self.embed_norm(self.position.embed(x, at))
        return out

    def initialise(self, part: nn.Module | None = None) -> None:
        """Draw initial weights, of a child of the model or of all (:mod:`gpt.model.initial`).

        Child by child, and block by block, draws the same numbers as all at once.
        """
        reset(self if part is None else part)

    def tie_weights(self) -> None:
        """Make the head's matrix the embedding's, where the configuration says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def new_cache(
        self,
        batch_size: int = 1,
        *,
        capacity: int | None = None,
        on_device: bool = False,
        stored_as: CacheFormat = "float",
    ) -> KVCache:
        """An empty cache for this model, of its dtype and on its device; with ``stored_as`` int8,
        keys and values are rounded. Its lengths are host integers, or with ``on_device`` a tensor,
        for compiled and captured decoding.
        """
        return KVCache(
            self.config,
            batch_size=batch_size,
            capacity=capacity,
            dtype=self.cache_dtype or self.dtype,
            device=self.device,
            on_device=on_device,
            stored_as=stored_as,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self._weight().dtype

    def _weight(self) -> Tensor:
        """The last norm's, or where it has none, the first that there is."""
        own = getattr(self.norm, "weight", None)
        if isinstance(own, Tensor):
            return own
        return next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Parameters, a tied head counted once; without ``embeddings``, what the blocks and norms
        hold.

        The head counts as an embedding, tied or not.
        """
        tables = {id(m.weight) for m in (self.embed, self.head)}
        tables |= {id(p) for p in self.position.parameters()}
        tables |= {id(m.weight) for m in self.blocks.modules() if isinstance(m, nn.Embedding)}
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in tables)

    def flops_per_token(self) -> int:
        """Floating-point operations of a forward and a backward pass for one token at full context:
        the sum of what the modules spend (:mod:`gpt.model.flops`). Looking up embeddings is free.
        """
        spending = [self.embed_norm, *self.blocks, self.norm, self.head]
        spending += [] if self.pointer is None else [self.pointer]
        return sum(flops_per_token(part, self.config.context_length) for part in spending)


Read = Callable[[GPT, Tensor], Tensor]
"""What a caller of :meth:`GPT.forward` computes from the model and its features ``[B, T, C]``."""


def parameter_count(config: ModelConfig) -> int:
    """How many parameters a :class:`GPT` of this shape has, a tied head counted once, without
    building it: an absurd ``n_layer`` costs nothing. At least 2**63 if torch cannot count them.
    """
    plain: dict[str, Any] = {"value_embeddings": 0, "skip_embedding": False, "skip_layers": False}
    try:
        with torch.device("meta"):
            one, two = (
                GPT(dataclasses.replace(config, n_layer=n, **plain)).parameter_count()
                for n in (1, 2)
            )
            skips = sum(p.numel() for p in Skips(config).parameters())
    except RuntimeError:  # a tensor that is larger than any memory
        return 2**63
    own, every = config.resolved(), config.value_embeddings
    tables = -(-config.n_layer // every) if every else 0
    values = tables * own.vocab_size * own.n_kv_head * own.head_dim
    return one + (config.n_layer - 1) * (two - one) + values + skips
