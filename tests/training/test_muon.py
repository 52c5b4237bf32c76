from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.training import muon
from gpt.training.muon import POLAR_EXPRESS, Muon, orthogonalise

SHAPES = [(24, 24), (24, 72), (96, 24), (30, 40), (1, 8)]
DTYPES = [torch.float32, torch.bfloat16]


def matrices_of(n, shape, *, seed=0):
    """Matrices with singular values from 1 down to 1/100."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(n, *shape, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -2, min(shape))) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_singular_value_becomes_about_one(shape, dtype):
    made = orthogonalise(matrices_of(3, shape).to(dtype))
    assert made.dtype == dtype
    values = torch.linalg.svdvals(made.double())
    assert values.max() < 1.16
    assert values.min() > 0.84


def test_the_coefficients_bring_every_value_above_a_hundredth_near_one():
    x = torch.linspace(0.01, 1, 10_001, dtype=torch.float64) / muon.SAFETY
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert 0.84 < x.min() < x.max() < 1.16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_the_iteration_equals_its_formula_in_float64(shape, dtype):
    matrices = matrices_of(2, shape)
    for matrix, made in zip(matrices.double(), orthogonalise(matrices.to(dtype)), strict=True):
        x = matrix / (matrix.norm() * muon.SAFETY)
        for a, b, c in POLAR_EXPRESS:
            x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
        assert (made.double() - x).norm() < (1e-3 if dtype == torch.float32 else 0.05) * x.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gradient_of_zeros_moves_nothing(shape, dtype):
    zeros = torch.zeros(2, *shape, dtype=dtype)
    assert torch.equal(orthogonalise(zeros), zeros)


class Products(TorchDispatchMode):
    """Counts matrix products, and the numbers in the largest result."""

    def __init__(self):
        super().__init__()
        self.counts, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, made = func.overloadpacket.__name__, func(*args, **kwargs or {})
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.counts[name, args[0].dtype] += 1
            self.largest = max(self.largest, made.numel())
        return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_one_shape_share_their_products(dtype):
    def products(n):
        parameters = [torch.nn.Parameter(torch.randn(24, 24)) for _ in range(n)]
        for parameter in parameters:
            parameter.grad = torch.randn(24, 24)
        with Products() as counted:
            Muon(parameters, lr=0.1, dtype=dtype).step()
        return counted.counts

    assert products(1) == products(7) == {("bmm", dtype): 5, ("baddbmm", dtype): 10}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 24), (24, 96)])
def test_products_use_the_shorter_side(shape, dtype):
    parameter = torch.nn.Parameter(torch.randn(shape))
    parameter.grad = torch.randn(shape)
    with Products() as counted:
        Muon([parameter], lr=0.1, dtype=dtype).step()
    assert counted.largest == 96 * 24


def test_float16_is_refused():
    with pytest.raises(ValueError, match=r"float16, and must be torch\.float32"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, dtype=torch.float16)


def trained(optimizer_of, *, steps=4):
    """Matrices of several shapes after some steps, and the optimizer's state."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in (*SHAPES, *SHAPES)]
    optimizer = optimizer_of(parameters)
    for _ in range(steps):
        for parameter in parameters[:-1]:  # one has no gradient
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer


def test_momentum_decay_and_rates_equal_torchs_muon(monkeypatch):
    monkeypatch.setattr(muon, "orthogonalise", lambda matrices: matrices)
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz", lambda gradient, *rest: gradient
    )
    options = {"lr": 0.1, "weight_decay": 0.3}
    mine, _ = trained(lambda parameters: Muon(parameters, **options))
    torchs, _ = trained(
        lambda parameters: torch.optim.Muon(parameters, **options, adjust_lr_fn="original")
    )
    for one, two in zip(mine, torchs, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_stacking_in_parts_changes_nothing_but_rounding(monkeypatch):
    whole, _ = trained(lambda parameters: Muon(parameters, lr=0.1))
    monkeypatch.setattr(muon, "AT_ONCE", 1)
    alone, _ = trained(lambda parameters: Muon(parameters, lr=0.1))
    for one, two in zip(whole, alone, strict=True):
        assert (one - two).norm() < 2e-2 * one.norm()


def test_the_state_of_torchs_muon_loads():
    options = {"lr": 0.1, "weight_decay": 0.1}
    _, torchs = trained(lambda p: torch.optim.Muon(p, **options, adjust_lr_fn="original"))
    _, mine = trained(lambda p: Muon(p, **options), steps=0)
    groups = mine.state_dict()["param_groups"]
    mine.load_state_dict({"state": torchs.state_dict()["state"], "param_groups": groups})
    state = mine.state[mine.param_groups[0]["params"][0]]
    theirs = torchs.state[torchs.param_groups[0]["params"][0]]
    assert list(state) == ["momentum_buffer"]
    assert torch.equal(state["momentum_buffer"], theirs["momentum_buffer"])
