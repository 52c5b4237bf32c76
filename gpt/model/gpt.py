"""GPT: a decoder-only transformer, as GPT-2 has it (Radford et al., 2019).

Tokens and positions are embedded, go through the blocks and a last norm, and the head gives a score
for each token of the vocabulary to come next. One forward serves training and decoding: training
passes no cache and pays nothing for its existence.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.attention import CausalSelfAttention
from gpt.model.block import Block
from gpt.model.cache import KVCache
from gpt.model.dropout import Dropout


class GPT(nn.Module):
    """A GPT of the shape that ``config`` gives, initialised as GPT-2 was."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        for name in ("vocab_size", "context_length"):
            if getattr(config, name) < 1:
                raise ValueError(f"model.{name} is 0, and a model needs at least 1")
        self.config = config
        self.cache_dtype: torch.dtype | None = None
        """Of keys and values; ``None``: the weights'."""
        # what modules draw for themselves does not count: weights follow from the seed alone,
        # made at once or part by part
        with torch.random.fork_rng(devices=[]):
            self.embed = _table(torch.empty(config.vocab_size, config.n_embd))
            self.position = _table(torch.empty(config.context_length, config.n_embd))
            self.dropout = Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.embed.weight.is_meta:
            self.initialise()

    def forward(
        self, tokens: Tensor, *, cache: KVCache | None = None, last_only: bool = False
    ) -> Tensor:
        """The logits of what follows each token: ``tokens`` ``[B, T]`` of int64 to ``[B, T, V]``.

        With a ``cache``, ``tokens`` continue the ones it holds, and are added to it. ``last_only``
        gives the last position's logits alone, ``[B, 1, V]``. Raises ``ValueError`` past
        ``context_length``, or what the cache has room for.
        """
        x = self.features(tokens, cache=cache)
        logits: Tensor = self.head(x[:, -1:] if last_only else x)
        return logits

    def features(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """What the head reads, ``[B, T, C]``: for whoever needs the logits of a few positions.

        ``forward`` is ``head(features(tokens))``, and takes the same arguments.
        """
        T = tokens.shape[1]
        if cache is None:
            if self.config.context_length < T:
                raise ValueError(
                    f"{T} tokens are longer than the model's context_length "
                    f"({self.config.context_length})"
                )
            positions, mask = torch.arange(T, device=tokens.device), None
        else:
            positions = cache.positions(T)
            mask = cache.mask(positions)
        x = self.embed(tokens)
        x = self.dropout(x + self.position(positions).to(x.dtype))
        for block in self.blocks:
            x = block(x, mask=mask, cache=cache)
        if cache is not None:
            cache.advance(T)
        out: Tensor = self.norm(x)
        return out

    @torch.no_grad()
    def initialise(self, part: nn.Module | None = None) -> None:
        """GPT-2's initial weights: N(0, 0.02), no biases, and what writes to the residual stream
        smaller.

        ``attn.out`` and ``mlp.down`` are scaled by ``1 / sqrt(2 n_layer)``, so that the stream's
        variance does not grow with the number of the branches that add to it. The children one by
        one, and the blocks among them, each as ``part``, draw the same numbers as all at once.
        """
        for name, module in (self if part is None else part).named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("attn.out", "mlp.down"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if writes_residual else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Make the head's matrix the embedding's, where the configuration says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def crop_context(self, context_length: int) -> None:
        """Shorten the context to its first ``context_length`` positions. Not while a cache is in
        use.
        """
        if not 0 < context_length <= self.config.context_length:
            raise ValueError(
                f"context_length is {context_length}, and must be from 1 to what the model has "
                f"({self.config.context_length})"
            )
        self.config = dataclasses.replace(self.config, context_length=context_length)
        self.position = _table(self.position.weight[:context_length].clone())

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int) -> None:
        """Cut the vocabulary to its first tokens, or grow it by rows that are the mean of the
        others.
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}, and must be at least 1")
        self.config = dataclasses.replace(self.config, vocab_size=vocab_size)
        self.embed = _table(_resized(self.embed.weight, vocab_size))
        self.head.weight = nn.Parameter(_resized(self.head.weight, vocab_size))
        self.head.out_features = vocab_size
        self.tie_weights()

    def set_dropout(self, p: float) -> None:
        """Change the probability of every dropout."""
        self.config = dataclasses.replace(self.config, dropout=p)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.p = p
            elif isinstance(module, CausalSelfAttention):
                module.dropout = p

    def new_cache(
        self,
        batch_size: int = 1,
        *,
        capacity: int | None = None,
        kind: type[KVCache] = KVCache,
    ) -> KVCache:
        """An empty cache for this model, of its dtype and on its device."""
        return kind(
            self.config,
            batch_size=batch_size,
            capacity=capacity,
            dtype=self.cache_dtype or self.position.weight.dtype,
            device=self.device,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.position.weight.device

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Parameters, a tied head counted once; without ``embeddings``, what the blocks and norms
        hold.

        The head counts as an embedding, tied or not.
        """
        tables = {id(m.weight) for m in (self.embed, self.position, self.head)}
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in tables)

    def flops_per_token(self) -> int:
        """Floating-point operations of a forward and a backward pass for one token at full context.

        Six for each parameter of a matrix product, and 12 * n_layer * n_embd * context_length for
        attention, the causal half counted whole (PaLM, arXiv:2204.02311, appendix B).
        """
        head = self.head.weight.numel()
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.context_length
        return 6 * (self.parameter_count(embeddings=False) + head) + attention


def parameter_count(config: ModelConfig) -> int:
    """How many parameters a :class:`GPT` of this shape has, a tied head counted once, without
    building it: an absurd ``n_layer`` costs nothing. At least 2**63 if torch cannot count them.
    """
    try:
        with torch.device("meta"):
            one, two = (
                GPT(dataclasses.replace(config, n_layer=n)).parameter_count() for n in (1, 2)
            )
    except RuntimeError:  # a tensor that is larger than any memory
        return 2**63
    return one + (config.n_layer - 1) * (two - one)


def _table(rows: Tensor) -> nn.Embedding:
    """An embedding of ``rows``: the usual way draws weights first, which on ``meta`` takes a
    second.
    """
    table: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    return table


def _resized(rows: Tensor, n: int) -> Tensor:
    new = rows.mean(dim=0, keepdim=True).expand(max(0, n - len(rows)), -1)
    return torch.cat([rows[:n], new])
