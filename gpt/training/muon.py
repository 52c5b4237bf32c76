"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum with nearly
orthogonal updates of a matrix, so that all its directions are learned at the same rate.

The iteration runs for all matrices of one shape in one batched product. The caller chooses its
dtype: ``torch.optim.Muon`` uses bfloat16, which is a scalar loop on a CPU without instructions for
it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from gpt.training.decay import decay

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients ``a, b, c`` of five iterations (Amsel et al., 2025, arXiv:2505.16932; for a safety
factor of 1.02, as in modded-nanogpt). They bring every singular value above 0.01 of the norm to
between 0.84 and 1.16.
"""
SAFETY = 1.02
AT_ONCE = 1 << 26
"""The most numbers in one batched product."""


class Muon(Optimizer):
    """Muon for matrices ``[N, K]``, with Nesterov momentum and decoupled weight decay.

    The state is the same as in ``torch.optim.Muon`` with ``adjust_lr_fn="original"``: a
    ``momentum_buffer`` for each matrix. A sharded matrix (``DTensor``) is gathered, and each
    process keeps its part of the update, so all processes must call ``step`` together.

    With ``cautious``, only the weights decay that have the sign of their update.

    ``dtype`` is for the iteration: float32, or bfloat16 if the device multiplies it. The range of
    float16 is too small for the coefficients. All processes must use the same dtype.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        cautious: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, and must be torch.float32 or torch.bfloat16")
        self.dtype, self.cautious = dtype, cautious
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                size = max(1, AT_ONCE // shape.numel())
                for start in range(0, len(parameters), size):
                    self._update(parameters[start : start + size], group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        momentum = group["momentum"]
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            direction = parameter.grad.lerp(state["momentum_buffer"], momentum)
            directions.append(_whole(direction))
        n_rows, n_columns = parameters[0].shape
        rate = group["lr"] * math.sqrt(max(1, n_rows / n_columns))
        updates = orthogonalise(torch.stack(directions).to(self.dtype))
        for parameter, update in zip(parameters, updates, strict=True):
            update = _like(update, parameter).to(parameter.dtype)
            decay(parameter, group["lr"] * group["weight_decay"], update if self.cautious else None)
            parameter.add_(update, alpha=-rate)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximations of the nearest semi-orthogonal matrices to ``matrices`` ``[B, N, K]``, in the
    same dtype (float32 or bfloat16): each singular value becomes about 1.

    Each iteration is ``X <- F X`` with ``F = a + b A + c A A`` and ``A = X X^T``. The next ``A`` is
    ``F A F``. So for a long matrix in float32, the small factors ``F`` are multiplied first, and
    ``X`` once at the end. In bfloat16, the rounding errors of ``A`` would grow with each iteration.
    """
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x / (SAFETY * x.float().norm(dim=(1, 2), keepdim=True) + 1e-6).to(x.dtype)
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        x = _by_factors(x)
    else:
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if turned else x


def _by_factors(x: Tensor) -> Tensor:
    """The iteration on ``x`` ``[B, N, K]``; only the first and the last product have ``K``
    columns.
    """
    gram, product = x @ x.mT, None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i + 1 < len(POLAR_EXPRESS):
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """``whole``, sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)
