"""``gpt plan``: what a run needs, before it starts: memory, time, GPUs, the line to type."""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.table import Table

from gpt.commands.gpus import GPUS, USABLE
from gpt.commands.vocabulary import with_vocabulary
from gpt.config import PlanConfig, UsageError, foreign
from gpt.console import open_console, tell
from gpt.device import choose_device, choose_precision, free_memory, memory
from gpt.model.adapter import adapt
from gpt.model.gpt import GPT, parameter_count
from gpt.training.budget import steps_of
from gpt.training.footprint import Footprint, Planner, cache_bytes
from gpt.training.parallel import STATE_BYTES, Strategy
from gpt.training.timing import measure_step

Checkpointing = Literal["none", "selective", "full"]
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
CHINCHILLA = 20
"""Tokens for each parameter at the lowest loss for the computation (arXiv:2203.15556)."""
DAY = 86_400
KINDS = "weights", "gradients", "optimizer", "activations", "temporary", "copies"


class Place(NamedTuple):
    """Where the run would be."""

    name: str
    memory: float
    """Bytes that tensors may take on each processor."""
    world: int
    peak: float | None
    """FLOP/s of each, if it is planned and not measured."""
    dtype: torch.dtype
    strategy: Strategy


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command prints."""

    place: Place
    parameters: int
    without_embeddings: int
    memory: dict[Checkpointing, dict[str, float]]
    """Bytes by kind, for each mode of activation checkpointing. ``peak`` is all that is alive at
    once; ``process`` is what the process takes for it, where this was measured."""
    cache: int
    """Bytes of the cache of one sequence of the full context, in generation."""
    steps: int
    """As ``training.max_steps``, or as many as fit into ``training.max_minutes``."""
    tokens: int
    flops: float
    step: float | None
    """Seconds of a step."""
    seconds: float | None
    """Of the whole run, with its evaluations."""
    how: str
    """Where the time is from."""
    sequences: int
    """Of a step, on each processor."""
    largest: dict[Checkpointing, int]
    """The largest micro batch that fits, by mode of activation checkpointing; 0: none."""
    micro_batch: int
    """The largest one that fits and divides a step's sequences, with the run's own mode; 0: none.
    """
    chinchilla: int
    """Tokens."""
    line: str
    """What to type."""


def plan(config: PlanConfig, settings: Path, words: Sequence[str]) -> int:
    """Run the command. ``settings`` is the TOML file, and ``words`` are the user's."""
    config = with_vocabulary(config)
    if more := _uncounted(config):
        tell(f"a step that learns the next tokens is planned; not counted: {more}")
    made = make_plan(config, settings, words)
    if config.json:
        shown = dataclasses.asdict(made)
        shown["place"] = {**made.place._asdict(), "dtype": _name(made.place.dtype)}
        sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    else:
        _print(config, made)
    return 0


def make_plan(config: PlanConfig, settings: Path, words: Sequence[str]) -> Plan:
    """The plan of a configuration with a known vocabulary."""
    model = config.model
    count = parameter_count(model)
    place = _place(config, count)
    whole = config.training.batch_tokens // model.context_length
    if whole % place.world:
        raise UsageError(
            f"training.batch_tokens is {config.training.batch_tokens:,}, which are {whole:,} "
            f"sequences, and {place.world} GPUs cannot share them equally"
        )
    sequences = whole // place.world
    rows = min(config.training.micro_batch_size, sequences)
    planners = {mode: _planner(config, place, mode) for mode in MODES}
    fixed = _state(config, place, planners["none"]) if place.strategy == "fsdp" else 0.0
    with torch.device("meta"):
        network = GPT(model)
        if config.adapter.kind != "none":
            adapt(network, config.adapter)
        each = network.flops_per_token()
    training, every = config.training, config.evaluation.every
    batch_tokens, steps, seconds = training.batch_tokens, training.max_steps, None
    if training.max_minutes and config.gpu == "none" and not config.measure:
        raise UsageError(
            "training.max_minutes is set, and how many steps fit into it is measured: leave out "
            "--no_measure, or set --training.max_minutes 0 and --training.max_steps"
        )
    flops = each * batch_tokens
    step, evaluation, overhead, how = _time(config, place, planners, flops, sequences)
    memories, largest = {}, {}
    for mode, planner in planners.items():
        found = planner.footprint(rows, accumulates=sequences > rows)
        memories[mode] = _by_kind(found, fixed, overhead)
        n = planner.largest(place.memory - (overhead or 0.0), rows=rows, state=fixed)
        largest[mode] = min(n, sequences)
    most = largest[config.training.activation_checkpointing]
    micro = max((n for n in range(1, most + 1) if sequences % n == 0), default=0)
    if step is not None:
        if training.max_minutes:
            steps = steps_of(60 * training.max_minutes, step, evaluation, every=every)
        seconds = steps * step + (1 + math.ceil(steps / every)) * evaluation
    tokens = batch_tokens * steps
    return Plan(
        place=place,
        parameters=count,
        without_embeddings=network.parameter_count(embeddings=False),
        memory=memories,
        cache=cache_bytes(model, place.dtype),
        steps=steps,
        tokens=tokens,
        flops=float(each) * tokens,
        step=step,
        seconds=seconds,
        how=how,
        sequences=sequences,
        largest=largest,
        micro_batch=micro,
        chinchilla=CHINCHILLA * count,
        line=_line(config, place, micro, settings, words),
    )


def _uncounted(config: PlanConfig) -> str:
    """What the run has beyond a :class:`gpt.training.rehearsal.Rehearsal`."""
    parts = {
        "the teachers of objective.distill": bool(config.objective.distill),
        f"what objective.kind {config.objective.kind} adds": config.objective.kind != "next_token",
        "what training.float8 saves": config.training.float8,
        "the first pass of training.scheduled_sampling": config.training.scheduled_sampling > 0,
    }
    return ", ".join(name for name, there in parts.items() if there)


def _place(config: PlanConfig, parameters: int) -> Place:
    precision = config.training.precision
    if config.gpu == "none":
        device = choose_device(config.training.device)
        n = torch.cuda.device_count() if device.type == "cuda" else 1
        total, peak = float(memory(device)), None
        total *= USABLE if device.type == "cuda" else 1
        dtype = choose_precision(precision, device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    else:
        gpu, n = GPUS[config.gpu], config.gpus
        name, total, peak = gpu.name, gpu.memory * USABLE, gpu.peak
        dtype = torch.bfloat16 if precision == "auto" else getattr(torch, precision)
        if dtype == torch.float32:
            raise UsageError(
                "training.precision is float32, and the table of GPUs has the speed of bfloat16 "
                "and float16"
            )
    strategy: Strategy = "single"
    if n > 1:
        wanted = config.parallel.strategy
        large = STATE_BYTES * parameters > total / 2 or config.parallel.shard_size > 0
        strategy = wanted if wanted != "auto" else "fsdp" if large else "ddp"
    return Place(name, total, n, peak, dtype, strategy)


def _on_gpu(config: PlanConfig) -> bool:
    return config.gpu != "none" or choose_device(config.training.device).type == "cuda"


def _planner(config: PlanConfig, place: Place, mode: Checkpointing) -> Planner:
    training = dataclasses.replace(config.training, activation_checkpointing=mode)
    one = dataclasses.replace(config, training=training)
    gpu = _on_gpu(config)
    fast = place.dtype if gpu else choose_precision("auto", torch.device("cpu"))
    return Planner(one, dtype=place.dtype, fast=fast, for_gpu=gpu)


def _state(config: PlanConfig, place: Place, planner: Planner) -> float:
    """Bytes of weights, gradients, optimizer and copies of one of the processes that shard them:
    its part, and two whole blocks, of which one is computed and the next one gathered.
    """
    found = planner.footprint(1, accumulates=True)
    n = config.parallel.shard_size or place.world
    one, two = (parameter_count(dataclasses.replace(config.model, n_layer=i)) for i in (1, 2))
    block = (two - one) * place.dtype.itemsize
    outside = 4 * (one - (two - one))  # embeddings and head, in float32
    return found.state / n + 2 * block + outside


def _by_kind(found: Footprint, fixed: float, overhead: float | None) -> dict[str, float]:
    kinds = {name: float(getattr(found, name)) for name in KINDS}
    peak = found.peak
    if fixed:
        peak = peak - found.state + fixed
        for name in (*KINDS[:3], "copies"):
            kinds[name] *= fixed / found.state
    measured = {} if overhead is None else {"process": peak + overhead}
    return {**kinds, "peak": peak, **measured}


def _time(
    config: PlanConfig,
    place: Place,
    planners: dict[Checkpointing, Planner],
    flops: float,
    sequences: int,
) -> tuple[float | None, float, float | None, str]:
    """Seconds of a step of so many FLOPs, and of an evaluation; the bytes of the process beyond the
    counted ones, if they were measured; and where the times are from. Evaluations of the whole
    held-out text are not known, and count as 0.
    """
    if place.peak is not None:
        how = f"at {config.mfu:.0%} of {place.peak / 1e12:,.0f} TFLOP/s each ({_source(config)})"
        return flops / (place.peak * place.world * config.mfu), 0.0, None, how
    if not config.measure:
        return None, 0.0, None, "not measured"
    device = choose_device(config.training.device)
    tell(f"measuring for about {config.seconds:g} seconds")
    time = measure_step(
        config,
        planners[config.training.activation_checkpointing],
        device=device,
        dtype=place.dtype,
        seconds=config.seconds,
        free=0.8 * (free_memory() if device.type == "cpu" else place.memory),
    )
    if time is None:
        how = "not measured: even a part of it takes more than the free memory, or --seconds"
        return None, 0.0, None, how
    rows = min(config.training.micro_batch_size, sequences)
    step = sequences / rows * time.micro_batch + time.update
    evaluation = config.evaluation.windows * time.evaluation / rows
    how = f"measured here: {time.how}, {_duration(step)} a step"
    return step, evaluation, time.overhead, how


def _source(config: PlanConfig) -> str:
    return GPUS[config.gpu].source


def _line(
    config: PlanConfig, place: Place, micro: int, settings: Path, words: Sequence[str]
) -> str:
    """The command that trains."""
    mine = {item.name for item in dataclasses.fields(PlanConfig)}
    mine -= {item.name for item in dataclasses.fields(PlanConfig.__mro__[1])}
    rest: list[str] = []
    skip = False
    for word in words[1:] if words and words[0].endswith(".toml") else words:
        name = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
        if word.startswith("--"):
            skip = name in mine
        if not skip:
            rest.append(word)
    given = settings if not settings.is_absolute() or words[:1] == [str(settings)] else None
    own = Path(__file__).parents[2] / "train.py"  # of a checkout
    script = "train.py" if own.is_file() and own.parent == Path.cwd() else "-m gpt train"
    start = f"python {script}"
    if place.world > 1:
        nodes = -(-place.world // config.node)
        each = place.world // nodes
        start = f"torchrun --nproc-per-node {each} {script}"
        if nodes > 1:
            start = (
                f"torchrun --nnodes {nodes} --nproc-per-node {each} --rdzv-backend c10d "
                f"--rdzv-endpoint FIRST_MACHINE:29500 {script}"
            )
    if micro and micro != config.training.micro_batch_size and config.gpu != "none":
        rest.append(f"--training.micro_batch_size={micro}")
    parts = [start, *([shlex.quote(str(given))] if given else []), *map(shlex.quote, rest)]
    return " ".join(parts)


def _print(config: PlanConfig, made: Plan) -> None:
    console, place, model = open_console(), made.place, config.model
    many = f"{place.world} x " if place.world > 1 else ""
    shared = f", {place.strategy}" if place.world > 1 else ""
    rows = min(config.training.micro_batch_size, made.sequences)
    about = Table(box=None, show_header=False, pad_edge=False)
    lines = {
        "model": f"{made.parameters:,} parameters ({made.without_embeddings:,} without "
        f"embeddings): {model.n_layer} layers, {model.n_embd} wide, context "
        f"{model.context_length:,}, vocabulary {model.vocab_size:,}",
        "where": f"{many}{foreign(place.name)}, {place.memory / 1e9:.1f} GB "
        f"{'each' if many else 'of memory'}, {_name(place.dtype)}{shared}",
        "run": f"{made.steps:,} steps of {config.training.batch_tokens:,} tokens: "
        f"{_count(made.tokens)} tokens, {made.tokens / made.parameters:,.1f} for each parameter",
        "computation": f"{made.flops:.2e} FLOPs",
        "time": f"{_duration(made.seconds)} ({made.how})" if made.seconds else made.how,
        "Chinchilla": f"{_count(made.chinchilla)} tokens for this size "
        f"({made.chinchilla / config.training.batch_tokens:,.0f} steps)",
        "generation": f"{made.cache / 1e6:,.1f} MB of cache for a sequence of "
        f"{model.context_length:,} tokens in {_name(place.dtype)}",
    }
    for name, text in lines.items():
        about.add_row(name, text)
    console.print(about)
    title = f"\nmemory of a step with micro batches of {rows}"
    console.print(f"{title}, by activation checkpointing, in GB{' of each GPU' if many else ''}")
    measured = ["of the process"] if "process" in made.memory["none"] else []
    table = Table("", *KINDS, "at the peak", *measured, "largest micro batch", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, kinds in made.memory.items():
        mark = " *" if mode == config.training.activation_checkpointing else ""
        shown = [f"{number / 1e9:.3f}" for number in kinds.values()]
        table.add_row(f"{mode}{mark}", *shown, f"{made.largest[mode] or 'none fits'}")
    console.print(table)
    if made.micro_batch == 0:
        what = "more GPUs (--gpus), a GPU with more memory, or activation checkpointing"
        console.print(f"\nthe step does not fit into the memory; try {what}")
    console.print(f"\n{made.line}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    for size, name in ((DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} seconds" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
