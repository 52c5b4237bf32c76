"""The model for training: new or given weights, and the wrappers around its blocks."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gpt.config import (
    AdapterConfig,
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    UsageError,
)
from gpt.device import check_memory, memory
from gpt.model.adapter import adapt, freeze
from gpt.model.gpt import GPT, parameter_count
from gpt.training.activations import checkpoint_activations
from gpt.training.backends import choose_attention
from gpt.training.compilation import compile_blocks
from gpt.training.float8 import use_float8
from gpt.training.parallel import STATE_BYTES, Strategy, World, replicate, shard

NO_ADAPTER = AdapterConfig()
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.6, "gguf": 0.6}
"""Of a frozen weight, by ``adapter.base``."""


def build_model(
    start: GPT | ModelConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    world: World,
    strategy: Strategy,
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
    adapter: AdapterConfig = NO_ADAPTER,
) -> tuple[GPT, nn.Module]:
    """The model to train, in training mode, and the module to call for a forward pass.

    ``start`` is a model with weights, or the shape of a new one. The order matters: activation
    checkpointing wraps a block, the compiler wraps both (or the whole model), and the strategy
    wraps the model. A compiled block keeps the attention kernels that were chosen before.
    """
    if strategy == "fsdp" and training.compile == "whole":
        raise UsageError(
            "training.compile is whole, and parallel.strategy is fsdp, which shards the model "
            "block by block; use on"
        )
    if isinstance(start, GPT):
        model = start
        model.config.check_learns()
    else:
        with torch.device("meta" if strategy == "fsdp" else "cpu"):
            model = GPT(start)
    if training.float8:
        use_float8(model, device=device)
    if adapter.kind != "none":
        adapt(model, adapter)
    freeze(model, training.freeze)
    model.train()
    checkpoint_activations(model, training.activation_checkpointing)
    rows = training.micro_batch_size
    choose_attention(model.config, world, rows=rows, device=device, dtype=dtype, say=say)
    compile_blocks(model, training.compile, device=device, say=say)
    if adapter.base == "gguf" and device.type != "cpu":
        raise UsageError(
            f"adapter.base is gguf, which only a CPU computes with, and the device is "
            f"{device.type}; use int8, int4 or float32"
        )
    if strategy == "fsdp" and adapter.base != "float32":
        raise UsageError(
            f"adapter.base is {adapter.base}, and parallel.strategy is fsdp, which cannot shard "
            "rounded weights; use ddp"
        )
    if strategy == "fsdp":
        shard(model, parallel, world, device=device, dtype=dtype)
        return model, model
    model.to(device)
    return model, replicate(model, device) if strategy == "ddp" else model


def whole_model(
    model: GPT,
    world: World,
    *,
    device: torch.device,
    dtype: torch.dtype,
    adapter: AdapterConfig = NO_ADAPTER,
    everywhere: bool = False,
) -> GPT | None:
    """An unsharded copy of a sharded model on the main process, or ``everywhere``; else ``None``.
    All processes must call this.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if world.is_main or everywhere:
            whole[name] = full.detach().to(device=device, dtype=dtype)
    if not (world.is_main or everywhere):
        return None
    with torch.device("meta"):
        copy = GPT(model.config)
        if adapter.kind != "none":
            adapt(copy, adapter)
    copy.load_state_dict(whole, strict=False, assign=True)
    copy.tie_weights()
    return copy.eval()


def saves_shards(config: CheckpointConfig, model: ModelConfig, strategy: Strategy) -> bool:
    """Whether each process writes its own part of a checkpoint."""
    if strategy != "fsdp" or config.format != "auto":
        return strategy == "fsdp" and config.format == "sharded"
    host = memory(torch.device("cpu"))
    return STATE_BYTES * parameter_count(model) > host / 2


def check_sizes(
    model: ModelConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    world: World,
    device: torch.device,
    adapter: AdapterConfig = NO_ADAPTER,
) -> None:
    """``UsageError`` if the run needs more memory than there is, before anything is built. The
    estimate is a lower bound, so it never refuses a run that fits.
    """
    sequences = training.batch_tokens // model.context_length
    n_parameters = parameter_count(model)
    frozen = BYTES[adapter.base]
    each = STATE_BYTES if adapter.kind == "none" and not training.freeze else frozen
    check_memory(
        f"the weights, gradients and optimizer state of {n_parameters:,} parameters",
        each * n_parameters / (1 if parallel.strategy == "ddp" else world.size),
        device,
        advice="choose a smaller model.n_layer, model.n_embd or model.vocab_size",
    )
    here = -(-sequences // world.size)
    ids = 8 * here * (model.context_length + 1)
    check_memory(
        f"the {here:,} sequences of a step",
        2 * ids,  # of this step and the next
        torch.device("cpu"),
        advice="choose a smaller training.batch_tokens",
    )
    kept = {"none": 8, "selective": 4, "full": 1}[training.activation_checkpointing]
    logits = model.vocab_size if adapter.kind == "none" else 0  # of an adapter in small parts
    numbers = logits + kept * model.n_layer * model.n_embd
    rows = min(training.micro_batch_size, here)
    check_memory(
        f"the activations of {rows:,} sequences of {model.context_length:,} tokens",
        2 * rows * model.context_length * numbers,
        device,
        advice="choose a smaller training.micro_batch_size or model.context_length, or set "
        "training.activation_checkpointing to full",
    )
