"""A dry run on CUDA without a GPU: `make test-fake-cuda`.

Fake tensors have shapes, dtypes and devices, and no numbers. So they find what is on the wrong
device or of the wrong dtype, and what reads a number where the host must not wait. pytest collects
this file only by its name, and it needs a CUDA build of torch.
"""

import dataclasses
import sys
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.config import GenerationConfig, ModelConfig, OptimizerConfig
from gpt.data.batches import IGNORED
from gpt.generation.ahead import TokenLoop
from gpt.generation.inference import prepare_for_inference
from gpt.generation.logprobs import logprobs_of
from gpt.generation.sampling import History, choose, penalise
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT
from gpt.training.loss import summed_loss
from gpt.training.optimizer import clip_gradients, gradient_norm, make_optimizers
from gpt.training.precision import autocast, loss_scaler

UNREACHED = """
What this dry run cannot reach, since it has no GPU:
  numbers: no result of any kernel is compared with anything
  the fused attention kernels, and the choice between them (fake tensors take the plain formula)
  the capture of a CUDA graph and its replay (the captured operations run one by one)
  Triton and torch.compile on CUDA
  pinned memory, streams, and copies that nobody waits for
  NCCL, and sharing between GPUs
  what the host reads from the GPU: decoding's loop, beams, verified guesses, float16's loss scale
"""
CONFIG = ModelConfig(vocab_size=61, context_length=64, n_layer=2, n_head=4, n_embd=64)
CUDA = torch.device("cuda")
VARIANTS = {
    "gpt2": {},
    "grouped-query": {"n_kv_head": 2},
    "multi-query, by layer": {"n_kv_head": 1, "scale_attention_by_layer": True},
    "no bias, untied": {"bias": False, "tie_embeddings": False},
}
WEIGHTS = ["float32", "bfloat16", "float16", "int8", "int4"]

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a CUDA build of torch"
)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Every tensor is a fake one, and the GPU that is not there multiplies bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode():
        yield


def model_of(**settings) -> GPT:
    with torch.device(CUDA):  # a fake module cannot be moved
        return GPT(dataclasses.replace(CONFIG, **settings))


def some_tokens(*shape):
    return torch.zeros(shape, dtype=torch.int64, device=CUDA)


@torch.no_grad()
def backward(loss):
    """What the autograd engine does, which without a driver does not start."""
    waiting, found = Counter(), [loss.grad_fn]
    for node in found:
        for child, _ in node.next_functions:
            if child is not None:
                waiting[child] += 1
                if waiting[child] == 1:
                    found.append(child)
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        own = gradients.pop(node, {})
        call = node.apply if isinstance(node, BackwardCFunction) else node  # of autograd.Function
        results = call(*[own.get(i) for i in range(len(node._input_metadata))])
        results = results if isinstance(results, tuple) else (results,)
        for (child, i), gradient in zip(node.next_functions, results, strict=True):
            if child is None:
                continue
            if gradient is not None:
                meta = child._input_metadata[i]
                gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)
                its = gradients.setdefault(child, {})
                its[i] = its[i] + gradient if i in its else gradient
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step(variant, dropout, dtype, optimizer):
    model = model_of(dropout=dropout, **VARIANTS[variant]).train()
    optimizers = make_optimizers(model, OptimizerConfig(name=optimizer), fast=torch.bfloat16)
    targets = some_tokens(3, 64).masked_fill(some_tokens(3, 64) > 3, IGNORED)
    for _ in range(2):  # the second has the optimizers' state
        with autocast(CUDA, dtype):
            logits = model(some_tokens(3, 64))
        assert logits.dtype == dtype
        loss = summed_loss(logits, targets) / 3
        assert (loss.dtype, loss.device.type) == (torch.float32, "cuda")
        backward(loss_scaler(CUDA, dtype).scale(loss))
        for name, parameter in model.named_parameters():
            assert parameter.grad.shape == parameter.shape, name
            assert (parameter.grad.dtype, parameter.grad.device.type) == (torch.float32, "cuda")
        clip_gradients(model, 1.0, gradient_norm(model))
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)


@pytest.mark.parametrize("weights", [None, *WEIGHTS])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()  # in inference mode torch.tensor looks for the driver
def test_a_cache_of_either_kind(variant, weights):
    model = model_of(**VARIANTS[variant]).eval()
    if weights is not None:
        model = prepare_for_inference(model, weights, device=CUDA)
    whole = model(some_tokens(3, 20))
    assert whole.shape == (3, 20, 61)
    cache = model.new_cache(3, capacity=40)
    assert cache.device.type == "cuda"
    for chunk in (7, 1, 5):
        assert model(some_tokens(3, chunk), cache=cache).shape == (3, chunk, 61)
    cache.truncate([13, 4, 9])
    for chunk in (2, 1):  # rows of unequal lengths
        assert model(some_tokens(3, chunk), cache=cache).dtype == whole.dtype
    cache.reorder([2, 0])
    arriving = model.new_cache(1)
    model(some_tokens(1, 6), cache=arriving, last_only=True)
    cache.add(arriving)
    assert cache.expand(2).lengths == [12, 12, 16, 16, 6, 6]
    static = model.new_cache(3, on_device=True)
    for chunk in (7, 1, 1):
        assert model(some_tokens(3, chunk), cache=static).shape == (3, chunk, 61)
    assert model(some_tokens(3, 1), cache=static.padded(3)).device.type == "cuda"


class Alone(TorchDispatchMode):
    """Operators that a captured graph may have: nothing goes between the host and the device."""

    def __torch_dispatch__(self, operator, types, args=(), options=None):
        result = operator(*args, **options or {})
        flat = torch.utils._pytree.tree_leaves((args, options, result))
        devices = {x.device.type for x in flat if isinstance(x, torch.Tensor)}
        assert devices <= {"cuda"}, f"{operator} is of {devices}"
        return result


@pytest.mark.parametrize("weights", [None, *WEIGHTS])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"bias": {3: 1.0}, "ban": (5,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [0, 1])
@torch.no_grad()
def test_the_operations_of_a_captured_token(kv_heads, settings, weights):
    model = model_of(n_kv_head=kv_heads).eval()
    if weights is not None:
        model = prepare_for_inference(model, weights, device=CUDA)
    cache = model.new_cache(4, on_device=True)
    loop = TokenLoop(cache, GenerationConfig(**settings), vocab_size=60)
    padded = cache.padded(4)
    with Alone():
        for _ in range(2):
            loop._choose_next(model, padded)
    assert loop._chosen.device.type == "cuda"


@torch.no_grad()
def test_penalties_and_scores():
    history = History(60, CUDA)
    history.add([1, 2, 3])
    config = GenerationConfig(repetition_penalty=1.2, presence_penalty=0.1, bias={1: 2.0})
    histories = history.after_each(some_tokens(4))
    logits = torch.zeros(5, 60, dtype=torch.bfloat16, device=CUDA)
    processed = penalise(logits, config, histories, early=[0, 1], ends={7})
    chosen = choose(processed, config, [0.5] * 5)
    histories.append(chosen)
    assert chosen.device.type == "cuda"
    model = model_of().eval()
    scores = logprobs_of(model, model.features(some_tokens(1, 20))[0], some_tokens(20))
    assert (scores.shape, scores.device.type) == ((20,), "cuda")


def test_what_is_read_or_on_the_wrong_device_is_found():
    """Else this file would say nothing."""
    on_gpu, on_cpu = torch.zeros(3, device=CUDA), torch.zeros(3)
    with pytest.raises(DataDependentOutputException):
        on_gpu.sum().item()
    with pytest.raises(RuntimeError, match="two devices"):
        on_gpu + on_cpu
    with pytest.raises(RuntimeError, match="same dtype"):
        on_gpu @ on_gpu.half()
    with pytest.raises(AssertionError, match="is of"), Alone():
        on_cpu.to(CUDA)
    with pytest.raises(RuntimeError, match="two devices"):
        model_of()(some_tokens(1, 4), cache=KVCache(CONFIG, device="cpu"))


if __name__ == "__main__":
    status = pytest.main(["-q", *sys.argv[1:], __file__])
    sys.stdout.write(UNREACHED)
    sys.exit(status)
