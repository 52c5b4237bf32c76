"""Activation checkpointing (arXiv:1604.06174): less memory for more time, block by block."""

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gpt.model.gpt import GPT

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operators whose results ``selective`` keeps: they take the longest to recompute. The attention
scores of the plain formula (``bmm``) would take too much memory (arXiv:2205.05198).
"""
if hasattr(aten, "_scaled_mm_v2"):  # of float8, in newer versions of torch
    KEPT.add(aten._scaled_mm_v2.default)


def checkpoint_activations(model: GPT, mode: Literal["none", "selective", "full"]) -> None:
    """Make each block recompute for the backward pass everything that ``mode`` does not keep.

    Changes the model in place. Gradients stay bit-identical: dropout draws the same numbers again.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        block.forward = functools.partial(_run, block.forward, options)


def _run(forward: Any, options: dict[str, Any], *args: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **keywords)
    return checkpoint(forward, *args, **options, **keywords)


def _policy(context: Any, operator: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    keep = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
