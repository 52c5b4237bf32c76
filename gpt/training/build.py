"""The model as it is trained: its weights from wherever they come, and what goes around its
blocks.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gpt import checkpoint as checkpoints
from gpt import tensors
from gpt.checkpoint import Checkpoint
from gpt.config import TrainConfig
from gpt.device import check_memory, memory
from gpt.model.gpt import GPT, parameter_count
from gpt.training.activations import checkpoint_activations
from gpt.training.backends import choose_attention
from gpt.training.compilation import compile_blocks
from gpt.training.parallel import STATE_BYTES, Strategy, World, replicate, shard

Fill = Callable[[str, nn.Module], None]


def build_model(
    config: TrainConfig,
    world: World,
    strategy: Strategy,
    *,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Checkpoint | None,
    model: GPT | None,
    say: Callable[[str], None],
) -> tuple[GPT, nn.Module]:
    """The model to train, in training mode, and what to call for a forward pass.

    The weights are those of the checkpoint, of ``model``, or new. The order matters: activation
    checkpointing goes around a block, the compiler around both, and what shares out the weights
    around all. A compiled block keeps the attention kernels that were chosen before.
    """
    if model is None and strategy == "fsdp":
        if checkpoint is not None:
            checkpoints.check_size(checkpoint)
        with torch.device("meta"):
            model = GPT(config.model)
        fill = _fill_new(model) if checkpoint is None else _fill_from(checkpoint, model)
    else:
        if checkpoint is not None:
            fitting = dataclasses.replace(checkpoint, model=config.model)
            model = checkpoints.load_model(fitting)
        model = model or GPT(config.model)
        fill = _leave
    model.train()
    checkpoint_activations(model, config.training.activation_checkpointing)
    rows = config.training.micro_batch_size
    choose_attention(config.model, world, rows=rows, device=device, dtype=dtype, say=say)
    compile_blocks(model, config.training.compile, device=device, say=say)
    if strategy == "fsdp":
        shard(model, config.parallel, world, device=device, dtype=dtype, fill=fill)
        return model, model
    model.to(device)
    return model, replicate(model, device) if strategy == "ddp" else model


def _leave(name: str, part: nn.Module) -> None:
    """The weights are there."""


def _fill_new(model: GPT) -> Fill:
    return lambda name, part: model.initialise(part)


def _fill_from(checkpoint: Checkpoint, model: GPT) -> Fill:
    path = checkpoint.path / checkpoints.MODEL
    there = tensors.describe(path)
    checkpoints.check_fit(checkpoint, there, dict(model.named_parameters()))

    def fill(name: str, part: nn.Module) -> None:
        wanted = {f"{name}.{of}": parameter.data for of, parameter in part.named_parameters()}
        tensors.read(path, {of: tensor for of, tensor in wanted.items() if of in there})

    return fill


def whole_model(
    model: GPT, world: World, *, device: torch.device, dtype: torch.dtype
) -> GPT | None:
    """On the main process, a copy of a model whose weights are shared out; all take part in it."""
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if world.is_main:
            whole[name] = full.detach().to(device=device, dtype=dtype)
    if not world.is_main:
        return None
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict(whole, strict=False, assign=True)
    copy.tie_weights()
    return copy.eval()


def saves_shards(config: TrainConfig, strategy: Strategy) -> bool:
    """Whether each process writes its own part of a checkpoint."""
    if strategy != "fsdp" or config.checkpoint.format != "auto":
        return strategy == "fsdp" and config.checkpoint.format == "sharded"
    host = memory(torch.device("cpu"))
    return STATE_BYTES * parameter_count(config.model) > host / 2


def check_sizes(config: TrainConfig, world: World, device: torch.device) -> None:
    """``UsageError`` if the run needs more memory than there is, before anything is built. What is
    counted is what any run needs at least, so whatever fits is let through.
    """
    model, sequences = config.model, config.training.batch_tokens // config.model.context_length
    n_parameters = parameter_count(model)
    check_memory(
        f"the weights, gradients and optimizer state of {n_parameters:,} parameters",
        STATE_BYTES * n_parameters / (1 if config.parallel.strategy == "ddp" else world.size),
        device,
        advice="a smaller model.n_layer, model.n_embd or model.vocab_size would do",
    )
    here = -(-sequences // world.size)
    ids = 8 * here * (model.context_length + 1)
    check_memory(
        f"the {here:,} sequences of a step",
        2 * ids,  # of this step and the next
        torch.device("cpu"),
        advice="a smaller training.batch_tokens would do",
    )
    kept = {"none": 8, "selective": 4, "full": 1}[config.training.activation_checkpointing]
    numbers = model.vocab_size + kept * model.n_layer * model.n_embd
    rows = min(config.training.micro_batch_size, here)
    check_memory(
        f"the activations of {rows:,} sequences of {model.context_length:,} tokens",
        2 * rows * model.context_length * numbers,
        device,
        advice="a smaller training.micro_batch_size or model.context_length, or "
        "training.activation_checkpointing full, would do",
    )
