"""Everything that ``train.py`` takes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt.config.checks import UsageError, check, number
from gpt.config.data import DataConfig
from gpt.config.model import ModelConfig

Device = Literal["auto", "cpu", "cuda", "mps"]


Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, and on what."""

    max_steps: int = number(10_000, at_least=1)
    """Optimizer updates in all."""
    batch_tokens: int = number(16_384, at_least=1)
    """Tokens that one step consumes; accumulation follows from it and micro_batch_size."""
    micro_batch_size: int = number(16, at_least=1)
    """Sequences that go through the model at once."""
    gradient_clip: float = number(1.0, at_least=0)
    """Largest norm of the gradient; 0: no clipping."""
    seed: int = number(1337, at_least=0)
    """Of the initial weights, the order of the data, and dropout."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    precision: Precision = "auto"
    """Of the matrix products; weights stay float32. auto: bfloat16 where the device has it."""
    tf32: bool = False
    """Let NVIDIA's tensor cores round float32's matrix products to TensorFloat-32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, block by block. auto: on CUDA with a working compiler."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Memory for time: selective keeps what linear layers and fused attention give, and computes
    the rest of a block again for the backward pass; full keeps a block's input alone."""
    skip_nonfinite: int = number(0, at_least=0)
    """Updates to skip in a run, and count, whose loss or gradient is not finite; one more stops
    it."""

    def __post_init__(self) -> None:
        check(self, "training.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for everything else."""
    learning_rate: float = number(6e-4, above=0)
    """AdamW's highest learning rate."""
    muon_learning_rate: float = number(0.02, above=0)
    """Muon's highest learning rate, scaled by the shape of each matrix."""
    beta1: float = number(0.9, at_least=0, below=1)
    """AdamW's decay of the mean of gradients."""
    beta2: float = number(0.95, at_least=0, below=1)
    """AdamW's decay of the mean of squared gradients."""
    weight_decay: float = number(0.1, at_least=0)
    """On matrices only: never on biases and norms."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warmup; wsd (warmup-stable-decay) holds, then falls in a line."""
    warmup_steps: int = number(100, at_least=0)
    """Steps over which the learning rate rises in a line from 0."""
    decay_fraction: float = number(0.2, at_least=0, at_most=1)
    """Of max_steps: wsd's last part, in which the learning rate falls."""
    floor: float = number(0.1, at_least=0, at_most=1)
    """What cosine and wsd end at, as a fraction of the highest learning rate."""

    def __post_init__(self) -> None:
        check(self, "optimizer.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the held-out text, and when."""

    every: int = number(250, at_least=1)
    """Steps between evaluations; there is always one at the end."""
    windows: int = number(200, at_least=0)
    """Fixed windows of context_length tokens, spread evenly over the held-out text; 0: all."""
    sample_tokens: int = number(200, at_least=0)
    """Length of the sample of text that goes with each evaluation; 0: none."""
    sample_prompt: str = ""
    """What the sample continues; empty: the start of a document."""

    def __post_init__(self) -> None:
        check(self, "evaluation.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run's state is kept."""

    every: int = number(0, at_least=0)
    """Steps between checkpoints beside those of each evaluation; 0: no others."""
    keep: int = number(2, at_least=1)
    """The newest checkpoints that stay; the best one always does."""
    keep_every: int = number(0, at_least=0)
    """Checkpoints at multiples of this many steps stay too; 0: no others."""
    format: Literal["auto", "full", "sharded"] = "auto"
    """full: one file, through the first process; sharded: each process writes its part. auto: full,
    unless an fsdp run's state is more than half of the host's memory."""

    def __post_init__(self) -> None:
        check(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of torchrun divide the work: each takes an equal share of a step's
    sequences.
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: a whole model in each; fsdp: the state is shared out between them. auto: ddp, unless the
    state is more than half of a GPU's memory."""
    shard_size: int = number(0, at_least=0)
    """fsdp, which it implies: how many processes share one copy of the state; 0: all. As many as a
    node has is hybrid sharding: between nodes go gradients alone."""

    def __post_init__(self) -> None:
        check(self, "parallel.")
        if self.shard_size and self.strategy == "ddp":
            raise UsageError(
                f"parallel.shard_size is {self.shard_size}, and parallel.strategy ddp shares out "
                "nothing: fsdp does"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells while it goes."""

    every: int = number(10, at_least=1)
    """Steps between lines of metrics.jsonl (and of plain output)."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send metrics to Weights & Biases, or keep them in the run's folder for a later sync."""
    wandb_project: str = "gpt"
    """The project there."""
    profile: int = number(0, at_least=0)
    """Steps to trace with torch.profiler, after two that warm up: trace.json in the run's folder,
    for Perfetto or chrome://tracing; 0: none."""

    def __post_init__(self) -> None:
        check(self, "log.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that ``train.py`` takes."""

    run_dir: str = ""
    """The run's folder: configuration, tokenizer, metrics, checkpoints. Empty: runs/ + the source's
    name."""
    resume: bool = False
    """Go on from the run's newest checkpoint; start if there is none yet."""
    init: str = ""
    """Start from this model, named as for sample.py; context_length and dropout still apply."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.model.context_length == 0 and not self.init:
            raise UsageError(
                "model.context_length is 0, and must be at least 1 (0 keeps the context of the "
                "model that init names)"
            )
        micro = self.training.micro_batch_size * self.model.context_length
        if micro and self.training.batch_tokens % micro:
            near = max(1, round(self.training.batch_tokens / micro)) * micro
            raise UsageError(
                f"training.batch_tokens is {self.training.batch_tokens}, and must be a multiple of "
                f"training.micro_batch_size * model.context_length ({micro}); {near} is the nearest"
            )

    @property
    def run(self) -> Path:
        """The run's folder, with the empty name resolved."""
        return run_of(self.run_dir, self.data.source)

    @property
    def cache_dir(self) -> Path:
        """Where this run's prepared tokens are."""
        return Path(self.data.cache_dir) if self.data.cache_dir else self.run / "data"


def run_of(run_dir: str, source: str) -> Path:
    """The run's folder: ``run_dir``, or else one in ``runs/`` with the source's name."""
    return Path(run_dir or f"runs/{DataConfig(source=source).name}")
