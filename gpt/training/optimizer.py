"""The optimizers and their groups: weight decay on matrices only, never on biases and norms."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from gpt.config import OptimizerConfig
from gpt.model.gpt import GPT
from gpt.training.muon import Muon


def make_optimizers(
    model: GPT, config: OptimizerConfig, *, fast: torch.dtype = torch.float32
) -> list[Optimizer]:
    """AdamW (arXiv:1711.05101) over all parameters that are not frozen, or Muon for the matrices of
    the blocks' linear layers beside it.

    Embeddings, biases and norms stay with AdamW (:mod:`gpt.training.muon`). ``fast`` is the
    dtype that the device multiplies fastest. Each group keeps its highest learning rate as
    ``peak_lr``, which the schedule scales.
    """
    optimizers: list[Optimizer] = []
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.name == "muon":
        linears = {n: m for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
        matrices = {
            name: rest.pop(name) for name in (f"blocks.{n}.weight" for n in linears) if name in rest
        }
        optimizers.append(
            Muon(
                matrices.values(),
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                dtype=torch.bfloat16 if fast == torch.bfloat16 else torch.float32,
            )
        )
    groups = [
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers.append(
        AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set each group's rate to ``factor`` of its highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


def describe_groups(optimizers: Iterable[Optimizer]) -> list[str]:
    """A line for each group of parameters: what is learned how."""
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
    """The norm of all gradients together, those of other processes' shards too."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, limit: float, norm: Tensor) -> None:
    """Scale the gradients, whose norm is ``norm``, to one of at most ``limit`` (0: leave them)."""
    if limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
