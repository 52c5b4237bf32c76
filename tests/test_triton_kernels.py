"""The kernels for GPUs. Without a GPU they run in Triton's interpreter, which shows that their
numbers are right, and are compiled for some GPUs, which shows that they would start there.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt import kernels
from gpt.config import UsageError
from gpt.generation import inference
from gpt.generation.inference import PackedLinear, prepare_for_inference
from gpt.generation.quantisation import Matrix

triton_kernels = pytest.importorskip(
    "gpt.triton_kernels", reason="needs Triton (pip install triton, on Linux)", exc_type=ImportError
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["int8", "int4"]
SHAPES = [(5, 128), (7, 96), (3, 200), (40, 32), (2, 1), (1, 513), (19, 4500)]
WITHIN = {  # of the product of the norms; the interpreter does not round to bfloat16 but cuts off
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 2**-7,
}


def matrix_of(kind, shape, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Matrix(kind, weight).to(DEVICE)


def dense_of(matrix):
    """As torch reads it on a CPU."""
    lows = None if matrix.lows is None else matrix.lows.cpu()
    return matrix._numbers(matrix.data.cpu(), matrix.scales.cpu(), lows, torch.float32)


def product(matrix, x, bias):
    bias = None if bias is None else bias.to(DEVICE)
    tensors = matrix.data, matrix.scales, matrix.lows
    return triton_kernels.linear(x.to(DEVICE), *tensors, matrix.width, bias).cpu()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_few_rows_is_that_of_the_dense_matrix(kind, shape, dtype, biased):
    matrix = matrix_of(kind, shape)
    dense, bias = dense_of(matrix), torch.randn(shape[0]) if biased else None
    for rows in (1, 3, 16, 32):
        x = torch.randn(rows, shape[1]).to(dtype)
        exact = x.float() @ dense.T + (0 if bias is None else bias)
        got = product(matrix, x, bias)
        assert got.dtype == dtype
        scale = x.float().norm(dim=1, keepdim=True) * dense.norm(dim=1) + exact.abs()
        assert ((got.float() - exact).abs() / scale).max() < WITHIN[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_more_rows_of_a_large_matrix_give_the_same(kind, monkeypatch):
    matrix, x = matrix_of(kind, (50, 200)), torch.randn(3, 200)
    small = [product(matrix, x[:n], None) for n in (1, 3)]
    monkeypatch.setattr(triton_kernels, "LARGE", 16)
    large = [product(matrix, x[:n], None) for n in (1, 3)]
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_matrix_is_what_torch_makes_of_it(kind, shape, dtype):
    matrix = matrix_of(kind, shape)
    tensors = matrix.data, matrix.scales, matrix.lows
    got, expected = triton_kernels.dense(*tensors, shape[1], dtype).cpu(), dense_of(matrix)
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected.to(dtype), rtol=2 * WITHIN[dtype], atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_passes_and_stays_in_its_row(kind, rows):
    matrix = matrix_of(kind, (6, 200))
    dense = dense_of(matrix)
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(rows, 200)
        x[rows // 2, 199] = value
        got, exact = product(matrix, x, None), x @ dense.T
        assert torch.equal(got.isfinite().all(dim=1), torch.arange(rows) != rows // 2)
        torch.testing.assert_close(got, exact, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_takes_any_leading_shape_and_refuses_more_rows_than_it_is_meant_for(kind):
    matrix, x = matrix_of(kind, (6, 64)), torch.randn(2, 3, 64)
    flat = product(matrix, x.flatten(0, 1), None)
    assert torch.equal(product(matrix, x, None), flat.view(2, 3, 6))
    assert torch.equal(product(matrix, x.mT.contiguous().mT, None), flat.view(2, 3, 6))
    assert product(matrix, x[:, :0], None).shape == (2, 0, 6)
    with pytest.raises(ValueError, match="up to 32 rows of activations, not 33"):
        product(matrix, torch.randn(33, 64), None)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, wherever it is."""

    is_cuda = True


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_few_rows_read_the_packed_matrix_and_more_rows_a_dense_one(kind, monkeypatch):
    linear = PackedLinear(matrix_of(kind, (7, 96)), torch.randn(7), torch.bfloat16, 0).to(DEVICE)
    dense, bias = dense_of(linear.matrix), linear.bias.cpu()
    linear.matrix.data = linear.matrix.data.as_subclass(OnGpu)
    monkeypatch.setattr(kernels, "library", lambda: None)  # of a CPU
    calls = []
    for name in ("linear", "dense"):
        kernel = getattr(triton_kernels, name)
        monkeypatch.setattr(
            triton_kernels, name, lambda *a, f=kernel, n=name: calls.append(n) or f(*a)
        )
    for shape, used in (((1, 1), "linear"), ((32, 1), "linear"), ((33, 1), "dense")):
        x = torch.randn(*shape, 96).bfloat16()
        got = linear(x.to(DEVICE).as_subclass(OnGpu)).as_subclass(torch.Tensor).cpu()
        assert (got.shape, got.dtype, calls.pop(), calls) == ((*shape, 7), x.dtype, used, [])
        exact = x.float() @ dense.T + bias
        assert (got - exact).norm() < 0.02 * exact.norm()
    rows = linear.matrix.rows(torch.tensor([[5], [2]], device=DEVICE), torch.float32)
    assert calls == ["dense"]
    assert torch.equal(rows.as_subclass(torch.Tensor).cpu(), dense[torch.tensor([[5], [2]])])


def test_fake_tensors_get_the_shapes_and_dtypes_of_real_ones():
    with FakeTensorMode():
        data, scales = torch.empty(7, 128, dtype=torch.uint8), torch.empty(7)
        x = torch.empty(2, 1, 96, dtype=torch.bfloat16)
        y = triton_kernels.linear(x, data, scales, None, 96, None)
        assert (y.shape, y.dtype) == ((2, 1, 7), torch.bfloat16)
        dense = triton_kernels.dense(data, scales, None, 96, torch.float16)
        assert (dense.shape, dense.dtype) == ((7, 96), torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_formats_are_refused_on_a_gpu_where_triton_does_not_work(
    kind, tiny_model, monkeypatch
):
    def fails(*args):
        raise subprocess.CalledProcessError(1, ["gcc"])

    monkeypatch.setattr(triton_kernels, "linear", fails)
    check = partial(inference._check_triton, kind, torch.device(DEVICE))
    with pytest.raises(UsageError, match=rf"{kind} need Triton on a GPU, .* \(Command '\['gcc'\]"):
        check()
    monkeypatch.undo()
    check()
    monkeypatch.setattr(triton_kernels, "dense", fails)  # each kernel is tried
    with pytest.raises(UsageError, match=f"{kind} need Triton on a GPU"):
        check()
    # Where there is no GPU either, this fails at the first tensor.
    monkeypatch.setattr(inference, "choose_precision", lambda *_: torch.bfloat16)
    with pytest.raises(UsageError, match=f"{kind} need Triton on a GPU"):
        prepare_for_inference(tiny_model, kind, device=torch.device("cuda"))


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpt import triton_kernels

EVERY = "every" in sys.argv

def compiled(kernel, capability, types, constants):
    types = types | {name: "constexpr" for name in constants}
    types = {name: types[name] for name in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=target, options={"num_warps": triton_kernels.WARPS})

for capability, x, precision, most in (
    (75, "*fp16", "tf32", 64), (86, "*bf16", "tf32", 99), (86, "*fp32", "ieee", 99),
    (90, "*bf16", "tf32", 227), (120, "*bf16", "tf32", 99),
):
    kinds = ("int8", "*fp32"), ("int4", "*bf16")
    for kind, scale in kinds if EVERY else kinds[capability // 10 % 2 :][:1]:
        types = {"data": "*u8", "scales": scale, "lows": scale, "N": "i32", "K": "i32"}
        lows = {} if kind == "int4" else {"lows": None}
        for tile, R, G in ((1, 4, 128), (1, 16, 32), (32, 16, 8))[0 if EVERY else 1 :]:
            constants = dict(PRECISION=precision, TILE=tile, R=R, G=G, WARPS=triton_kernels.WARPS)
            products = types | {"x": x, "y": x, "bias": "*fp32", "M": "i32"}
            done = compiled(triton_kernels._linear, capability, products, constants | lows)
            assert done.metadata.shared <= most << 10, (capability, x, kind, tile, done.metadata)
        compiled(triton_kernels._dense, capability, types | {"out": x}, dict(R=4, G=32) | lows)
"""


@pytest.mark.parametrize(
    "words",
    [pytest.param([], id="one"), pytest.param(["every"], id="every", marks=pytest.mark.slow)],
)
def test_the_kernels_compile_for_gpus_from_turing_to_blackwell_and_fit_their_shared_memory(words):
    """In the usual run one format for each GPU, and not the tile that needs the least memory."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", "-c", COMPILE, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
