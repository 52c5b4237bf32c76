"""The processes that torchrun started, and how they communicate.

Each process takes an equal share of a step's sequences. With ``ddp``, each has the whole model, and
gradients are averaged (arXiv:2006.15704). With ``fsdp`` (torch's ``fully_shard``), each has a part
of every weight, gradient and optimizer state, and gathers a block's weights when it needs them
(ZeRO, arXiv:1910.02054). A single process is a world too: its communication is a no-op.
"""

import contextlib
import functools
import gc
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpt.config import ParallelConfig, UsageError, foreign, quoted
from gpt.model.gpt import GPT
from gpt.model.moe import MoE

T = TypeVar("T")
Strategy = Literal["single", "ddp", "fsdp"]
STATE_BYTES = 16
"""Per parameter: its weight, gradient, and two moments in float32."""
PATIENCE = timedelta(days=7)
"""How long the processes wait for a slow one, for example one that writes a checkpoint. A process
that dies ends the others without this wait.
"""


@dataclass
class World:
    """The processes of a run, and the rank of this one."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None
    """Messages between the processes, since their last start."""
    job: dist.Store | None = None
    """A store that survives when torchrun restarts the processes."""
    _broadcasts: int = 0
    _patient: dist.ProcessGroup | None = None
    """All processes, with gloo."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def split(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of this process in a step's windows. All parts have the same size."""
        part: NDArray[np.int64] = windows.reshape(self.size, -1)[self.rank]
        return part

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place. Tensors on the CPU use gloo: no wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        if self.size == 1:
            return number
        everywhere = torch.tensor(int(number))
        dist.all_reduce(everywhere, dist.ReduceOp.MAX)
        return int(everywhere)

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call ``make`` on the main process, and return its result, a JSON value, on all.

        The others wait as long as necessary. If ``make`` raises, they raise ``UsageError`` with the
        same message.
        """
        if self.store is None:
            return make()
        self._broadcasts += 1
        key = f"broadcast {self._broadcasts}"
        if self.is_main:
            try:
                result = make()
            except Exception as error:
                self.store.set(key, json.dumps({"error": str(error)}))
                raise
            self.store.set(key, json.dumps({"result": result}))
            return result
        self.store.wait([key], PATIENCE)
        outcome = json.loads(self.store.get(key))
        if "error" in outcome:
            raise UsageError(outcome["error"])
        value: T = outcome["result"]
        return value

    def wait_for_all(self) -> None:
        """Wait until all processes are here, as long as necessary. NCCL, which gives up after
        minutes, can be used afterwards.
        """
        if self._patient is not None:
            dist.all_reduce(torch.zeros(1), group=self._patient)

    def main_first(self, make: Callable[[], T]) -> T:
        """Call ``make`` on all processes, and on the main process first."""
        results: list[T] = []

        self.broadcast(lambda: results.append(make()))
        return results[0] if results else make()

    def connect(self, device: torch.device) -> None:
        """Set up communication of tensors on ``device`` and on the CPU."""
        if self.size == 1:
            return
        if device.type == "mps":
            raise UsageError("device is mps, which can train with a single process only")
        if device.type == "cuda":
            n_gpus = torch.cuda.device_count()
            local_rank = int(os.environ.get("LOCAL_RANK", self.rank % n_gpus))
            if local_rank >= n_gpus:
                raise UsageError(
                    f"torchrun started process {local_rank} on a machine with {n_gpus} GPUs: "
                    f"use --nproc-per-node {n_gpus}"
                )
            torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size)
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def remember(self, run: str) -> None:
        """Store that this job has begun ``run``, for processes that torchrun restarts."""
        if self.job is not None:
            self.job.set(f"run {run}", "")

    def remembers(self, run: str) -> bool:
        """Whether this job had begun ``run`` before torchrun restarted the processes."""
        return self.job is not None and bool(self.job.check([f"run {run}"]))

    def fails_first(self) -> bool:
        """Whether this is the first process to fail. Only its error is printed."""
        try:
            return self.store is None or self.store.add("failures", 1) == 1
        except dist.DistError:  # the process that held the store has exited
            return True


@contextlib.contextmanager
def join() -> Iterator[World]:
    """A context with the world of torchrun's environment variables; without them, a world of one
    process.

    If the processes fail, only the first error is raised. The other processes exit with
    ``SystemExit``.
    """
    if _from_environment("WORLD_SIZE", 1) == 1:
        yield World()
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        _from_environment(name, 0)
    try:
        job, rank, size = next(dist.rendezvous("env://"))
    except ValueError as error:  # another variable is missing
        raise UsageError(f"WORLD_SIZE is set, as torchrun does, but {foreign(error)}") from None
    world = World(rank, size, store=_meet(job, rank, size), job=job)
    try:
        yield world
        world.wait_for_all()
        world._patient = None
        gc.collect()  # a process group that is still referenced would abort the process at its end
        dist.destroy_process_group()
    except Exception as error:
        if not world.fails_first():
            raise SystemExit(2) from None
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if lost and not isinstance(error, UsageError):
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"process {rank} of {size} has lost another process, which was killed or stopped "
                f"({reason}); --resume continues from the last checkpoint"
            ) from error
        raise


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(
            f"the environment variable {name} is {quoted(text)}, and must be a whole number, which "
            "torchrun sets; unset it if you do not use torchrun"
        )
    return int(text)


def _meet(job: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the job's store that only these processes use, and no earlier ones.

    torchrun keeps the store when it restarts processes, and each machine counts restarts by itself.
    So the first process announces a meeting, and each other process answers with a random word. The
    first one lists the words that it has read. A process that does not find its word in the list
    has answered an old meeting, and tries again.
    """
    word = secrets.token_hex(8)
    if rank == 0:
        job.set("meeting", word)
        answers = [f"{word} {other}" for other in range(1, size)]
        job.wait(answers)
        job.set(f"{word} heard", json.dumps([job.get(answer).decode() for answer in answers]))
        return dist.PrefixStore(word, job)
    while True:
        job.wait(["meeting"])
        meeting = job.get("meeting").decode()
        job.set(f"{meeting} {rank}", word)
        try:
            job.wait([f"{meeting} heard"], timedelta(seconds=1))
        except dist.DistStoreError:
            continue  # some have not answered yet, or the meeting is old
        heard = json.loads(job.get(f"{meeting} heard"))
        if rank <= len(heard) and heard[rank - 1] == word:
            return dist.PrefixStore(meeting, job)
        time.sleep(0.05)


def choose_strategy(
    config: ParallelConfig, world: World, *, n_parameters: int, device: torch.device
) -> Strategy:
    """The strategy to use; ``UsageError`` if the number of processes does not fit the
    configuration.
    """
    if world.size == 1:
        return "single"
    if config.shard_size and world.size % config.shard_size:
        raise UsageError(
            f"parallel.shard_size is {config.shard_size}, and must divide the number of processes "
            f"({world.size})"
        )
    if config.strategy != "auto":
        return config.strategy
    if config.shard_size:
        return "fsdp"
    if device.type != "cuda":
        return "ddp"
    memory = torch.cuda.get_device_properties(device).total_memory
    return "fsdp" if STATE_BYTES * n_parameters > memory / 2 else "ddp"


def replicate(model: GPT, device: torch.device) -> DistributedDataParallel:
    """The model, wrapped so that its backward pass averages the gradients over all processes."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(
    model: GPT,
    config: ParallelConfig,
    world: World,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Shard the model's weights between the processes, in place.

    A ``model`` on ``meta`` gets new weights part by part: each part is initialised in full and then
    sharded, so that no process ever holds more than one whole block.
    On GPUs, blocks are gathered in ``dtype``, and embeddings and head in float32. Gradients are
    averaged in float32.
    """
    n_shards = config.shard_size or world.size
    mesh = init_device_mesh(
        device.type, (world.size // n_shards, n_shards), mesh_dim_names=("replicate", "shard")
    )
    if n_shards == world.size:
        mesh = mesh["shard"]
    small = device.type == "cuda" and dtype != torch.float32  # norms on a CPU need one dtype
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if small else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does it
    )
    is_new = model.embed.weight.is_meta
    for name, part in parts(model):
        model.tie_weights()
        if any(parameter.is_meta for parameter in part.parameters()):
            part.to_empty(device="cpu")
        if is_new:  # a tied head draws again into the embedding, as without shards
            model.initialise(part)
        if name.startswith("blocks."):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=_preferences(part))
    fully_shard(model, mesh=mesh, ignored_params=_preferences(model))
    for parameter in _preferences(model):
        parameter.data = parameter.data.to(device)


def _preferences(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of experts that no gradient moves: they stay whole in each process."""
    moes = (part for part in module.modules() if isinstance(part, MoE))
    return {moe.preference for moe in moes if moe.preference is not None}


def only_here(forward: nn.Module) -> contextlib.AbstractContextManager[object]:
    """A context for backward passes without communication; a later one averages the gradients.
    fsdp averages in each one, because it keeps no whole gradients.
    """
    if isinstance(forward, DistributedDataParallel):
        return forward.no_sync()
    return contextlib.nullcontext()


def parts(model: GPT) -> Iterator[tuple[str, nn.Module]]:
    """The model's children, with each block separately, in the order of their initialisation."""
    for name, child in model.named_children():
        if name == "blocks":
            yield from ((f"blocks.{i}", block) for i, block in enumerate(child.children()))
        else:
            yield name, child


@functools.cache  # creating a mesh involves all processes
def cpu_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of the same processes for tensors on the CPU."""
    if mesh.device_type == "cpu":
        return mesh
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
