"""Mixture of experts: a feed-forward layer of which each token uses a part (Shazeer et al., 2017,
arXiv:1701.06538; Switch, arXiv:2101.03961; Mixtral, arXiv:2401.04088).
"""

import math

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.flops import flops_per_token
from gpt.model.initial import STD, normal
from gpt.model.mlp import MLPS

ROWS = 64
"""In training, an expert's tokens are padded to a multiple of this: a CPU prepares a product in
bfloat16 anew for each number of rows (benchmarks/experts.py).
"""


class MoE(nn.Module):
    """A router gives each token ``n_expert_active`` of ``n_expert`` experts; shared experts take
    every token. No token is dropped outside of training, so a token's output depends on no other.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        make = MLPS[config.mlp]
        self.experts = nn.ModuleList(make(config, layer) for _ in range(config.n_expert))
        self.shared = nn.ModuleList(make(config, layer) for _ in range(config.moe_shared))
        self.preference: nn.Parameter | None = None
        """Added to the router's scores for the choice alone; it follows the load (DeepSeek-V3,
        arXiv:2412.19437, section 2.1.2)."""
        if config.moe_balance == "bias":
            self.preference = nn.Parameter(torch.zeros(config.n_expert), requires_grad=False)
        self.loss: Tensor | None = None
        """The weighted balancing losses of the last forward pass in training."""
        self.load: Tensor | None = None
        """How many choices fell on each expert since :meth:`rebalance`, in training; activation
        checkpointing computes and counts each twice."""

    @torch.no_grad()
    def reset(self) -> None:
        """The router as N(0, 0.02), each expert as a feed-forward layer."""
        normal(self.router, STD)
        for expert in (*self.experts, *self.shared):
            expert.reset()
        if self.preference is not None:
            self.preference.zero_()

    def flops_per_token(self, context_length: int) -> int:
        """Those of the router, and of the experts that one token goes through."""
        used = [self.router, *self.shared, *self.experts[: self.config.n_expert_active]]
        return sum(flops_per_token(part, context_length) for part in used)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        flat, k = x.reshape(-1, x.shape[-1]), self.config.n_expert_active
        logits = self._logits(flat)
        scores = logits.softmax(-1) if self.config.moe_score == "softmax" else logits.sigmoid()
        preferred = scores if self.preference is None else scores + self.preference
        chosen = preferred.topk(k, dim=-1).indices  # N, k
        weights = scores.gather(1, chosen)
        if self.config.moe_renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training:
            self._watch(logits, scores, chosen)
            if self.config.moe_capacity:
                weights = weights * self._in_capacity(chosen)
        out = (self._outputs(flat, chosen) * weights[..., None].to(x.dtype)).sum(dim=1)
        for expert in self.shared:
            out = out + expert(flat)
        result: Tensor = out.view_as(x)
        return result

    def _logits(self, x: Tensor) -> Tensor:
        """The router's, ``[N, E]``, not in autocast's dtype: close choices would change."""
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(self.router, nn.Linear):
                x = x.to(self.router.weight.dtype)
            logits: Tensor = self.router(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def compute_eagerly(self) -> None:
        """Before the layer is compiled: leave out the experts, whose sizes differ at each call."""
        self._outputs = torch.compiler.disable(self._outputs)  # type: ignore[method-assign]

    def _outputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """``[N, k, C]`` of each token's experts. The tokens are sorted by expert, so that each
        expert is one product over its own tokens.
        """
        k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = x[order // k].split(counts)
        outputs = []
        for expert, part in zip(self.experts, parts, strict=True):
            if self.training:  # without tokens too, so that each parameter has a gradient
                rows = nn.functional.pad(part, (0, 0, 0, -len(part) % ROWS))
                outputs.append(expert(rows)[: len(part)])
            elif len(part):
                outputs.append(expert(part))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(outputs)[back].view(*chosen.shape, -1)

    def _in_capacity(self, chosen: Tensor) -> Tensor:
        """Which choices, ``[N, k]``, their experts have room for: first choices before second ones,
        and earlier tokens before later ones (GShard, arXiv:2006.16668).
        """
        config = self.config
        room = math.ceil(config.moe_capacity * chosen.numel() / config.n_expert)
        turn = nn.functional.one_hot(chosen.T.flatten(), config.n_expert).cumsum(dim=0)
        number = turn.gather(1, chosen.T.reshape(-1, 1)).view(chosen.T.shape).T
        return number <= room

    def _watch(self, logits: Tensor, scores: Tensor, chosen: Tensor) -> None:
        """Count the choices, and compute the loss.

        Switch's is ``E * sum(f * P)``, with ``f`` the part of the tokens that have an expert as
        their first choice, and ``P`` its mean probability; Mixtral's counts all choices in ``f``,
        which then sums to ``k``.
        """
        config, E = self.config, self.config.n_expert
        every = torch.bincount(chosen.flatten(), minlength=E)
        self.load = every if self.load is None else self.load + every
        loss = logits.new_zeros(())
        if config.moe_balance in ("switch", "mixtral"):
            counted = chosen[:, 0] if config.moe_balance == "switch" else chosen.flatten()
            part = torch.bincount(counted, minlength=E) / len(chosen)
            mean = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=0)
            loss = loss + config.moe_balance_weight * E * (part * mean).sum()
        if config.moe_z_weight:
            loss = loss + config.moe_z_weight * logits.logsumexp(dim=-1).square().mean()
        self.loss = loss

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """After an update: ``load`` ``[E]`` counts its choices of all processes. The preference for
        experts with less than an equal share rises by ``moe_balance_weight``, that for the others
        falls.
        """
        if self.preference is not None:
            below = load.sum() / len(load) - load
            self.preference.add_(self.config.moe_balance_weight * below.sign())
        self.load = None


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The sum of the balancing losses of the last forward pass, which are then forgotten; ``None``
    if there are none.
    """
    losses = []
    for module in model.modules():
        if isinstance(module, MoE) and module.loss is not None:
            losses.append(module.loss)
            module.loss = None
    return torch.stack(losses).sum() if losses else None
