"""``make asan``: the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every path
that this processor can run; exits with 1 if one of them reads or writes past anything, or if the
sanitizer does not find a matrix that is said to have one row more than there is.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import tempfile

import torch

from gpt import cpp_library, kernels, training_kernels
from gpt.config import ModelConfig
from gpt.generation.inference import FEW, InferenceGPT, prepare_for_inference
from gpt.generation.quantisation import Matrix
from tests.conftest import make_model
from tests.test_training_kernels import CASES, computed_by

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
SHAPES = [(1, 1), (2, 1), (5, 31), (3, 33), (7, 96), (5, 127), (5, 128), (1, 129), (3, 200),
          (65, 513), (130, 48), (300, 160)]  # fmt: skip
"""Rows and columns of matrices; the last has as many numbers as more than one thread reads."""
ROWS = [1, 2, 3, 4, 5, 7, 8, 31, FEW, FEW + 9]
MODELS = [
    {"n_embd": 32, "n_head": 2},
    {"n_embd": 48, "n_head": 1, "n_inner": 1},
    {"n_embd": 96, "n_head": 3, "n_inner": 201, "bias": False},
    {"n_embd": 160, "n_head": 2, "n_kv_head": 1, "activation": "silu", "vocab_size": 33},
    {"n_embd": 192, "n_head": 4, "n_kv_head": 2, "activation": "gelu", "n_layer": 1},
    {"n_embd": 256, "n_head": 1, "activation": "relu", "tie_embeddings": False},
    {"n_embd": 64, "n_head": 4, "activation": "tanh", "scale_attention_by_layer": True},
]
CAPACITIES = [1, 4, 5, 15, 16, 33]
GGUF = {"int8_gguf", "int4_gguf"}
"""Formats that are not made of numbers here, but read."""
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def products() -> int:
    """Each matrix of each format, times each number of rows, and unpacked."""
    count = 0
    for kind, (rows, columns) in itertools.product(kernels.FORMATS, SHAPES):
        if kind in GGUF:
            columns += -columns % 32
            tensors = of_gguf(kind, rows, columns)
            for dtype in (torch.float32, torch.bfloat16):
                kernels.dense(kernels.RawMatrix(kind, columns, *tensors), dtype)
        else:
            matrix = Matrix(kind, torch.randn(rows, columns))
            tensors = matrix.data, matrix.scales, matrix.lows
            for dtype in (torch.float32, torch.bfloat16):
                matrix.dense(dtype)
                matrix.rows(torch.tensor([rows - 1, 0]), dtype)
        for bias in (None, torch.randn(rows)):
            raw = kernels.RawMatrix(kind, columns, *tensors, bias)
            for x in (torch.randn(n, columns) for n in ROWS):
                kernels.linear(x, raw)
                count += 1
            for bad in (torch.nan, torch.inf, -torch.inf, 3e38, 1e-45):
                kernels.linear(torch.full((2, columns), bad), raw)
                count += 1
    return count


def of_gguf(
    kind: str, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A matrix of a GGUF file's blocks: its bytes, scales and offsets."""
    packed = kernels.PACKED[kind]
    data = torch.randint(256, (rows, packed.row_bytes(columns)), dtype=torch.uint8)
    scales = torch.rand(rows, *packed.row_scales(columns)).to(packed.scales)
    return data, scales, scales.clone() if packed.has_lows else None


def decoded(model: InferenceGPT, dtype: torch.dtype, capacity: int, rows: int, step: int) -> None:
    """Rows of ``capacity`` tokens, ``step`` at once, up to the cache's last slot; then unequal
    rows.
    """
    rounded = dtype == torch.int8
    cache = model.new_cache(rows, capacity=capacity, stored_as="int8" if rounded else "float")
    for store in () if rounded else cache.stores.values():
        store.keys, store.values = store.keys.to(dtype), store.values.to(dtype)
    tokens = torch.randint(model.config.vocab_size, (rows, capacity))
    for chunk in tokens.split(step, dim=1):
        model(chunk, cache=cache)
    cache.truncate([capacity - 1 - row % capacity for row in range(rows)])
    model(tokens[:, :1], cache=cache)


def overread() -> None:
    """One row more than there is."""
    matrix = kernels.RawMatrix("float32", 64, torch.ones(3, 64), None, None)
    matrix.N += 1
    kernels.linear(torch.ones(1, 64), matrix)


@torch.inference_mode(False)
def training() -> int:
    """The kernels for training, on 1 and on 3 threads; returns how many results there were."""
    assert training_kernels.library() is not None
    n = 0
    for threads, name, dtype in itertools.product((1, 3), CASES, training_kernels.TYPES):
        torch.set_num_threads(threads)
        n += len(computed_by(name, dtype)[0])
    for rows, width, dtype in itertools.product((1, 5), (1, 15, 16, 33), training_kernels.TYPES):
        x, y = torch.randn(2, rows, width), torch.randn(2, rows, width, requires_grad=True)
        out = training_kernels.add_dropped(x, y.to(dtype), 0.3)[:, None]
        out = training_kernels.causal_attention(out, out, out, p=0.2, scale=1.0)
        out.sum().backward()
        n += 1
    return n


@torch.inference_mode()
def check(folder: str, what: str) -> None:
    """Run everything with the libraries in ``folder``, and print how much that was."""
    cpp_library.load = lambda source: ctypes.CDLL(f"{folder}/{source.stem}.so")
    library = kernels.load()
    kernels.library = lambda: library
    torch.manual_seed(0)
    if what == "overread":
        overread()
        return
    calls = products()
    blocks, run = 0, kernels.Blocks.run

    def counted(self, x, tokens):
        nonlocal blocks
        blocks += 1
        run(self, x, tokens)

    kernels.Blocks.run = counted
    for threads, models in ((1, MODELS), (3, MODELS[3:5])):  # a share of 3 is uneven
        torch.set_num_threads(threads)
        for changes, kind in itertools.product(models, kernels.FORMATS.keys() - GGUF):
            shape = {"vocab_size": 257, "context_length": 33, "n_layer": 2} | changes
            model = prepare_for_inference(make_model(ModelConfig(**shape)), kind)
            for capacity, dtype in itertools.product(CAPACITIES, DTYPES):
                for rows, step in ((1, 1), (1, 5), (3, 4)):
                    decoded(model, dtype, capacity, rows, step)
            decoded(model, torch.float32, 5, 2 * FEW, 1)
    print(f"{calls:,} products, {blocks:,} runs of blocks, {training()} of training", flush=True)


def main() -> int:
    """Each path in a process of its own, into which the sanitizer is loaded first."""
    command, _ = cpp_library.command(kernels.SOURCE)
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    ask = [[command[0], f"-print-file-name={name}"] for name in names]
    preload = [subprocess.check_output(words, text=True).strip() for words in ask]
    is_x86 = "-march=native" in command and "x86" in os.uname().machine
    failed = 0
    for march in ["native", "x86-64-v3", "x86-64"] if is_x86 else ["native"]:
        with tempfile.TemporaryDirectory() as folder:
            words = [word for word in command if not word.startswith("-march")]
            words += [f"-march={march}", *SANITIZE]
            for source in (kernels.SOURCE, training_kernels.SOURCE):
                path = f"{folder}/{source.stem}.so"
                subprocess.run([*words, "-o", path, str(source)], check=True)
            environment = os.environ | {
                "LD_PRELOAD": " ".join(preload),
                "ASAN_OPTIONS": "detect_leaks=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "OMP_WAIT_POLICY": "passive",
            }
            again = [sys.executable, "-m", "tests.asan", folder]
            seen = subprocess.run(
                [*again, "overread"], env=environment, stderr=subprocess.PIPE, text=True
            )
            found = "heap-buffer-overflow" in seen.stderr
            print(f"{march}: an overread is {'' if found else 'NOT '}found; ", end="", flush=True)
            clean = subprocess.run([*again, "all"], env=environment).returncode == 0
            failed += not (found and clean)
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(*sys.argv[1:])
    else:
        sys.exit(main())
