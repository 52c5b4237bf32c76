"""Checkpoints during training: the run copies its state, and a thread writes the copy.

The run waits only for the copy. There is at most one copy at a time: the next save, and the end of
the run, wait until it is written. An error in the thread is raised at the next step.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt import checkpoint as checkpoints
from gpt.checkpoint import State
from gpt.config import CheckpointConfig, UsageError
from gpt.training.parallel import PATIENCE, World, cpu_mesh


class Saver:
    """Writes states as checkpoints of ``run``, one after the other.

    ``flush`` is called before a checkpoint is written, so that the metrics up to it are on the
    disk.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        world: World,
        *,
        last: str | None = None,
        sharded: bool = False,
        flush: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._run, self._config, self._world = run, config, world
        self._flush, self._say = flush, say
        self._group: dist.ProcessGroup | None = None  # the thread's own
        if sharded:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[str, Tensor] = {}
        self._own: list[str] = []
        self.last = last
        """The name of the newest complete checkpoint."""
        self.stalls: list[float] = []
        """Seconds for which each save stopped the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, Exception):  # not for a second Ctrl-C
            self._join()
        if kind is None:
            self._world.wait_for_all()
            self.check()

    def save(self, state: State, *, best: str | None) -> None:
        """Copy the state and start writing it. ``best`` is the name of the best checkpoint so far,
        this one or another.
        """
        start = time.perf_counter()
        self._join()
        self._world.wait_for_all()  # other processes may still have been writing
        self.check()
        copied = dataclasses.replace(
            state,
            weights=self._copy("model", state.weights),
            training=self._copy("training", state.training),
        )
        self._thread = threading.Thread(target=self._write, args=(copied, best), daemon=True)
        self._thread.start()
        self.stalls.append(time.perf_counter() - start)

    def check(self) -> None:
        """Raise the thread's error, if there is one."""
        if self._error is not None:
            error, self._error = self._error, None
            if not isinstance(error, OSError):
                raise error
            before = (
                f"those up to {self.last} are complete, and --resume continues from there"
                if self.last
                else "there is no earlier one"
            )
            raise UsageError(
                f"a checkpoint of {self._run} cannot be written: {error}; {before}"
            ) from error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU, in memory that each save reuses: whole tensors on the main process, or
        each process's shards.
        """
        copies, on_gpu = {}, False
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            on_gpu |= tensor.is_cuda
            if not isinstance(tensor, DTensor):
                if self._world.is_main or self._group is not None:
                    copies[name] = self._keep(f"{part}/{name}", tensor)
            elif self._group is None:
                whole = tensor.full_tensor()  # all processes must call it
                if self._world.is_main:
                    copies[name] = self._keep(f"{part}/{name}", whole)
            else:
                copies[name] = DTensor.from_local(
                    self._keep(f"{part}/{name}", tensor.to_local()),
                    cpu_mesh(tensor.device_mesh),
                    tensor.placements,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._copies:
            self._copies[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[name].copy_(tensor, non_blocking=True)

    def _write(self, state: State, best: str | None) -> None:
        try:
            if self._world.is_main:
                self._flush()
            if self._group is not None:
                checkpoints.save_sharded(self._run, state, self._group, own=self._own)
            elif self._world.is_main:
                checkpoints.save(self._run, state, own=self._own)
            if self._world.is_main:
                self._own.append(state.name)
                point_and_prune(
                    self._run,
                    self._config,
                    last=state.name,
                    best=best,
                    own=self._own,
                    say=self._say,
                )
            self.last = state.name
        except Exception as error:
            self._error = error


def point_and_prune(
    run: Path,
    config: CheckpointConfig,
    *,
    last: str,
    best: str | None,
    own: Collection[str] = (),
    say: Callable[[str], None],
) -> None:
    """Make ``RUN/last`` and ``RUN/best`` name these checkpoints, and delete old ones; ``own`` are
    those that this process wrote. ``say`` gets a sentence for each one that cannot be deleted.
    """
    checkpoints.point(run, "last", last)
    if best is not None and checkpoints.pointed(run, "best") != best:
        checkpoints.point(run, "best", best)
    problems = checkpoints.prune(run, keep=config.keep, keep_every=config.keep_every, own=own)
    for problem in problems:
        say(problem)
