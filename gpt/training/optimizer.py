"""The optimizers and their groups of parameters, by role: only matrices have weight decay."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from gpt.config import OptimizerConfig
from gpt.model.gpt import GPT
from gpt.model.selection import matches, selected
from gpt.training.muon import Muon

Role = Literal["hidden matrix", "embedding", "vector"]


def roles(model: GPT) -> dict[str, Role]:
    """The role of each parameter that is not frozen, by name.

    ``hidden matrix``: the weight of a linear layer in a block. ``embedding``: any other matrix, of
    tokens, positions or the head. ``vector``: a bias, or the weight of a norm.
    """
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def role(name: str, parameter: Tensor) -> Role:
        if parameter.ndim < 2:
            return "vector"
        hidden = name.startswith("blocks.") and name.removesuffix(".weight") in linears
        return "hidden matrix" if hidden else "embedding"

    return {name: role(name, p) for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(
    model: GPT, config: OptimizerConfig, *, fast: torch.dtype = torch.float32
) -> list[Optimizer]:
    """AdamW (arXiv:1711.05101) for all parameters that are not frozen; or Muon for the hidden
    matrices and AdamW for the rest (:mod:`gpt.training.muon`).

    ``config.rates`` scales the learning rate of parameters by their names. ``fast`` is the dtype
    that the device multiplies fastest. Each group keeps its highest learning rate as ``peak_lr``,
    which the schedule scales.
    """
    named = roles(model)
    decayed: set[Role] = {"hidden matrix", "embedding"}

    rates = config.rate_factors()
    if rates:
        selected(named, tuple(rates), "optimizer.rates")
    factors = {
        name: next((f for pattern, f in rates.items() if matches(name, pattern)), 1.0)
        for name in named
    }

    def having(wanted: set[Role]) -> list[nn.Parameter]:
        return [model.get_parameter(name) for name, role in named.items() if role in wanted]

    def grouped(wanted: set[Role], rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """A group of parameters for each factor of the learning rate."""
        found: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, role in named.items():
            if role in wanted:
                found.setdefault(factors[name], []).append(model.get_parameter(name))
        return [
            {"params": parameters, "lr": factor * rate, "weight_decay": weight_decay}
            for factor, parameters in found.items()
            if parameters or factor == 1.0
        ]

    optimizers: list[Optimizer] = []
    if config.name == "muon" and having({"hidden matrix"}):
        decayed = {"embedding"}
        optimizers.append(
            Muon(
                grouped({"hidden matrix"}, config.muon_learning_rate, config.weight_decay),
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                dtype=torch.bfloat16 if fast == torch.bfloat16 else torch.float32,
            )
        )
    groups = [
        *grouped(decayed, config.learning_rate, config.weight_decay),
        *grouped({"vector"}, config.learning_rate, 0.0),
    ]
    if any(group["params"] for group in groups):
        betas = (config.beta1, config.beta2)
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set each group's learning rate to ``factor`` times its highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


def describe_groups(optimizers: Iterable[Optimizer]) -> list[str]:
    """A line for each group of parameters: its optimizer, size, learning rate and weight decay."""
    lines = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parameters = group["params"]
            if not parameters:
                continue
            kind = "matrices" if parameters[0].ndim >= 2 else "biases and norms"
            count = sum(parameter.numel() for parameter in parameters)
            lines.append(
                f"{type(optimizer).__name__.lower():<8} {len(parameters)} {kind} ({count:,} "
                f"numbers), learning rate {group['peak_lr']:g}, decay {group['weight_decay']:g}"
            )
    return lines


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, including other processes' shards."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, limit: float, norm: Tensor) -> None:
    """Scale the gradients from the norm ``norm`` down to at most ``limit``; 0: no limit."""
    if limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
