"""The memory of a training step, counted before there is a run.

The step of :mod:`gpt.training.rehearsal` runs on fake tensors, which have shapes and no numbers.
A dispatch mode counts the bytes of the storages that are alive. So every variant of the model, each
mode of activation checkpointing and each optimizer is counted by what it does, not by a formula.
All layers of one kind take the same, so a very deep model is counted with fewer layers, and
extrapolated.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import training_kernels
from gpt.config import CacheFormat, ModelConfig, TrainConfig
from gpt.model import attend
from gpt.model.gpt import GPT
from gpt.training import loss
from gpt.training.rehearsal import Rehearsal

CPU = torch.device("cpu")
DEEP = 24
"""The most layers that are counted without extrapolation. With fewer, the peak may be at another
place of a step than it is in the whole model, and grow with the depth in another way."""


class Footprint(NamedTuple):
    """Bytes of a training step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What the forward pass of a micro batch keeps for its backward pass."""
    forward: float
    """All that is alive at the peak of the forward pass."""
    backward: float
    """All that is alive at the peak of the backward pass."""
    update: float
    """All that is alive at the peak of the optimizer's update."""
    copies: float
    """Copies beside the step's own tensors: the state that a thread writes as a checkpoint (on a
    CPU; for a GPU it is in the host's memory), and the average of the weights."""

    @property
    def state(self) -> float:
        """What a run keeps from step to step, with the gradients."""
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def passes(self) -> float:
        """All that is alive at the peak of forward and backward pass."""
        return max(self.forward, self.backward)

    @property
    def peak(self) -> float:
        """All that is alive at the peak of a step, after the first checkpoint."""
        return max(self.passes, self.update) + self.copies

    @property
    def temporary(self) -> float:
        """What the peak has beside weights, gradients, optimizer state, activations and copies."""
        return max(0.0, self.peak - self.state - self.activations)


class Planner:
    """Counts the steps of one configuration. ``for_gpu`` counts the kernels of a GPU: attention is
    fused in every dtype. ``fast`` is the dtype that the device multiplies fastest.
    """

    def __init__(
        self, config: TrainConfig, *, dtype: torch.dtype, fast: torch.dtype, for_gpu: bool
    ) -> None:
        self.config, self.dtype, self.fast, self.for_gpu = config, dtype, fast, for_gpu
        self.period = period_of(config.model)
        self._counted: dict[tuple[int, int, bool], Footprint] = {}

    def footprint(self, rows: int, *, accumulates: bool) -> Footprint:
        """Of a step with micro batches of ``rows`` sequences. With ``accumulates``, a step has
        several, and all but the first find gradients there.
        """
        if self.config.model.n_expert:  # their sizes depend on numbers, so few rows are computed
            one, two = (self._deep(n, accumulates) for n in (1, 2))
            return _extrapolated(one, two, rows - 1)
        return self._deep(rows, accumulates)

    def largest(self, limit: float, *, rows: int, state: float = 0.0) -> int:
        """The most sequences of a micro batch whose step takes at most ``limit`` bytes; 0: none.
        ``rows`` is a number that is counted anyway. ``state`` replaces the bytes of weights,
        gradients, optimizer and copies, if given.
        """
        n = max(2, rows)
        one, many, twice = (self.footprint(m, accumulates=True) for m in (1, n, 2 * n))
        left = limit - one.copies - (state - one.state if state else 0.0)
        if max(one.passes, one.update) > left:
            return 0
        if many.passes > left:
            return 1 + int((left - one.passes) / (many.passes - one.passes) * (n - 1))
        return n + int((left - many.passes) / (twice.passes - many.passes) * n)

    def at(self, n_layer: int, rows: int) -> Footprint:
        """Of a step with gradients of earlier micro batches, for so many layers."""
        return self._deep(rows, True, n_layer)

    def _deep(self, rows: int, accumulates: bool, n_layer: int = 0) -> Footprint:
        n_layer, p = n_layer or self.config.model.n_layer, self.period
        few = p if self.config.model.n_expert else max(p, DEEP - 2 * p)
        if n_layer <= few + 2 * p:
            return self._count(n_layer, rows, accumulates)
        start = few + (n_layer - few) % p  # whole periods are left
        one, two = (self._count(start + n * p, rows, accumulates) for n in (0, 1))
        return _extrapolated(one, two, (n_layer - start) // p)

    def _count(self, n_layer: int, rows: int, accumulates: bool) -> Footprint:
        about = n_layer, rows, accumulates
        if about not in self._counted:
            self._counted[about] = self._count_now(*about)
        return self._counted[about]

    def _count_now(self, n_layer: int, rows: int, accumulates: bool) -> Footprint:
        fake = contextlib.nullcontext() if self.config.model.n_expert else FakeTensorMode()
        gpu = _kernels_of_a_gpu() if self.for_gpu else contextlib.nullcontext()
        state = torch.get_rng_state()
        live = Live()
        all_count = mock.patch.object(loss, "counted_positions", return_value=None)
        with gpu, fake, all_count, live:
            step = Rehearsal(
                self.config, n_layer=n_layer, device=CPU, dtype=self.dtype, fast=self.fast
            )
            weights = live.now
            gradients = _give_gradients(step.model)
            step.update()
            optimizer = live.now - weights
            if accumulates:
                _give_gradients(step.model)
            live.restart()
            before = live.now
            total = step.forward(rows)
            activations, forward = live.now - before, live.peak
            live.restart()
            total.backward()
            del total
            backward = live.peak
            live.restart()
            step.update()
            copies = sum(each.nbytes for each in step.copied(checkpoint=not self.for_gpu))
            found = Footprint(
                weights, gradients, optimizer, activations, forward, backward, live.peak,
                float(copies),
            )  # fmt: skip
        torch.set_rng_state(state)
        return found


def period_of(model: ModelConfig) -> int:
    """After how many layers their kinds repeat."""
    return max(1, len(model.window_pattern))


def cache_bytes(model: ModelConfig, dtype: torch.dtype, stored_as: CacheFormat = "float") -> int:
    """Bytes of the keys and values of one sequence of the full context."""
    with FakeTensorMode():
        made = GPT(dataclasses.replace(model, n_layer=period_of(model)))
        made.cache_dtype = dtype
        n: int = made.new_cache(stored_as=stored_as).nbytes
    return n * model.n_layer // period_of(model)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage]
        self._known = weakref.WeakValueDictionary()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, and count its new tensors."""
        out = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._known.get(id(storage)) is storage:
            return
        n = storage.nbytes()
        self._known[id(storage)] = storage
        self.now += n
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, n)

    def _free(self, n: int) -> None:
        self.now -= n


def _extrapolated(first: Footprint, second: Footprint, steps: int) -> Footprint:
    """What comes ``steps`` after ``first``, if ``second`` comes one after it."""
    return Footprint(*(a + steps * (b - a) for a, b in zip(first, second, strict=True)))


def _give_gradients(model: GPT) -> int:
    """Give each parameter that learns a gradient, as a backward pass does. Returns their bytes."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            total += parameter.grad.nbytes
    return total


@contextlib.contextmanager
def _kernels_of_a_gpu() -> Iterator[None]:
    """On the CPU's fake tensors, choose as on a GPU: fused attention, larger parts of logits."""
    with (
        mock.patch.object(attend, "_fused_is_slow", return_value=False),
        mock.patch.object(training_kernels, "library", return_value=None),
        mock.patch.dict(loss.CHUNK, cpu=loss.CHUNK["gpu"]),
        mock.patch.dict(loss.LOGITS, cpu=loss.LOGITS["gpu"]),
    ):
        yield
