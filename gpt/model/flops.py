"""Floating-point operations of training: each module says what it spends on a token."""

from torch import nn


def flops_per_token(module: nn.Module, context_length: int) -> int:
    """FLOPs of a forward and a backward pass for one token of a text of ``context_length``.

    Each parameter takes 6: a multiplication and an addition, once forward and twice backward (PaLM,
    arXiv:2204.02311, appendix B). A module with another cost has a method ``flops_per_token``.
    """
    own = getattr(module, "flops_per_token", None)
    if own is not None:
        flops: int = own(context_length)
        return flops
    parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    children = (flops_per_token(child, context_length) for child in module.children())
    return 6 * parameters + sum(children)
