"""The optimizers and their groups of parameters, by role: only matrices have weight decay."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from gpt.config import OptimizerConfig
from gpt.model.gpt import GPT
from gpt.model.selection import matches, selected
from gpt.training.decay import CautiousAdamW
from gpt.training.muon import Muon

T = TypeVar("T")
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

    ``config.rates``, ``decays`` and ``betas`` give parameters their own settings by their names.
    ``fast`` is the dtype that the device multiplies fastest. Each group keeps its highest learning
    rate as ``peak_lr``, which the schedule scales.
    """
    named = roles(model)
    rates, decays, betas = config.rate_factors(), config.decay_factors(), config.pairs_of_betas()
    matrices = [name for name, role in named.items() if role != "vector"]  # the others never decay
    has_muon = config.name == "muon"
    adamw = [name for name, role in named.items() if not (has_muon and role == "hidden matrix")]
    fields = (("rates", rates, named), ("decays", decays, matrices), ("betas", betas, adamw))
    for field, patterns, having_it in fields:
        if patterns:
            selected(having_it, tuple(patterns), f"optimizer.{field}")
    usual = config.beta1, config.beta2

    def having(wanted: set[Role]) -> list[nn.Parameter]:
        return [model.get_parameter(name) for name, role in named.items() if role in wanted]

    def grouped(
        wanted: set[Role], rate: float, decay: float, *, adamw: bool
    ) -> list[dict[str, Any]]:
        """A group of parameters for each of the settings that some of them have."""
        first = (1.0, 1.0, usual) if adamw else (1.0, 1.0, None)
        found: dict[Any, list[nn.Parameter]] = {first: []}
        for name, role in named.items():
            if role in wanted:
                of_adamw = _of(name, betas, usual) if adamw else None
                setting = _of(name, rates, 1.0), _of(name, decays, 1.0), of_adamw
                found.setdefault(setting, []).append(model.get_parameter(name))
        return [
            {"params": parameters, "lr": by * rate, "weight_decay": decay_by * decay}
            | ({} if of_adamw is None else {"betas": of_adamw})
            for (by, decay_by, of_adamw), parameters in found.items()
            if parameters or (by, decay_by, of_adamw) == first
        ]

    optimizers: list[Optimizer] = []
    decayed: set[Role] = {"hidden matrix", "embedding"}
    if config.name == "muon" and having({"hidden matrix"}):
        decayed = {"embedding"}
        optimizers.append(
            Muon(
                grouped(
                    {"hidden matrix"}, config.muon_learning_rate, config.weight_decay, adamw=False
                ),
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                cautious=config.cautious_decay,
                dtype=torch.bfloat16 if fast == torch.bfloat16 else torch.float32,
            )
        )
    groups = [
        *grouped(decayed, config.learning_rate, config.weight_decay, adamw=True),
        *grouped({"vector"}, config.learning_rate, 0.0, adamw=True),
    ]
    if any(group["params"] for group in groups):
        kind = CautiousAdamW if config.cautious_decay else AdamW
        optimizers.append(kind(groups, lr=config.learning_rate, betas=usual, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _of(name: str, by_pattern: Mapping[str, T], usual: T) -> T:
    """What the first pattern that matches the name gives, or else the usual."""
    return next((own for pattern, own in by_pattern.items() if matches(name, pattern)), usual)


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
