"""Options of ``train.py``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt.config.adapter import AdapterConfig
from gpt.config.checks import UsageError, check, number, quoted
from gpt.config.data import DataConfig
from gpt.config.model import ModelConfig
from gpt.config.objective import ObjectiveConfig

Device = Literal["auto", "cpu", "cuda", "mps"]


Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of the training, batch sizes, device and precision."""

    max_steps: int = number(10_000, at_least=1)
    """Total number of optimizer updates."""
    max_minutes: float = number(0.0, at_least=0)
    """Plan max_steps so that the run takes about this many minutes, from a measurement of a few
    steps and an evaluation before it begins. config.toml has the plan. 0: as max_steps says."""
    batch_tokens: int = number(16_384, at_least=1)
    """Tokens per step over all processes. Gradients are accumulated over as many micro batches as
    this needs."""
    micro_batch_size: int = number(16, at_least=1)
    """Sequences in one forward pass on one process."""
    gradient_clip: float = number(1.0, at_least=0)
    """Maximum norm of the gradient; 0: no clipping."""
    seed: int = number(1337, at_least=0)
    """Seed of the initial weights, the order of the data, and dropout."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    precision: Precision = "auto"
    """Precision of matrix products; weights stay in float32. auto: bfloat16 if the device supports
    it."""
    tf32: bool = False
    """Compute float32 matrix products in TensorFloat-32 on NVIDIA GPUs."""
    float8: bool = False
    """Multiply in float8 in the blocks' linear layers, on a GPU that can (Ada, Hopper and newer;
    arXiv:2209.05433). Evaluations, the head and the weights keep their precision."""
    compile: Literal["auto", "on", "off", "whole"] = "auto"
    """Apply torch.compile to each block. auto: on CUDA with a working compiler; whole: to the
    forward pass and its loss as one graph, which takes longer to compile."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Saves memory and costs time. selective: keep the outputs of linear layers and fused
    attention, and recompute the rest of a block in the backward pass; full: keep only a block's
    input."""
    skip_nonfinite: int = number(0, at_least=0)
    """How many updates with a loss or gradient that is not finite a run may skip; one more stops
    the run."""
    scheduled_sampling: float = number(0.0, at_least=0, at_most=1)
    """Scheduled sampling: the highest share of input tokens that are replaced by the model's own
    predictions, in a second forward pass (arXiv:1906.07651); 0: none, and no second pass."""
    scheduled_sampling_schedule: Literal["linear", "sigmoid", "constant"] = "linear"
    """How the share rises to its highest value: linear: evenly, up to the last step; sigmoid:
    slowly, quickly, slowly (arXiv:1506.03099); constant: at once."""
    scheduled_sampling_start: float = number(0.0, at_least=0, below=1)
    """The fraction of max_steps after which the share begins to rise."""
    window_start: int = number(0, at_least=0)
    """In training, attention windows begin with this many tokens, and grow in steps of as many
    until they are the model's own; 0: they are the model's own from the start."""
    window_fraction: float = number(0.5, above=0, at_most=1)
    """The fraction of max_steps in which attention windows grow."""
    average_fraction: float = number(0.0, at_least=0, at_most=1)
    """The last fraction of max_steps, over which the weights are averaged. Evaluations and
    checkpoints then have the averages, and resuming has both; 0: none."""
    average_decay: float = number(1.0, above=0, at_most=1)
    """How much older weights count in the average after each step. 1: all the same; 0.99: those of
    about the last 100 steps count (an exponential moving average)."""

    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters that stay as they are: embed.weight, 'blocks.0.*', or in
    every block 'attn.*'."""

    def __post_init__(self) -> None:
        check(self, "training.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all weights; muon: Muon for the blocks' matrices, AdamW for the rest."""
    learning_rate: float = number(6e-4, above=0)
    """AdamW's peak learning rate."""
    muon_learning_rate: float = number(0.02, above=0)
    """Muon's peak learning rate; it is scaled by the shape of each matrix."""
    muon_momentum: float = number(0.95, at_least=0, below=1)
    """Muon's decay rate of the gradients' running mean."""
    beta1: float = number(0.9, at_least=0, below=1)
    """AdamW's decay rate of the gradients' running mean."""
    beta2: float = number(0.95, at_least=0, below=1)
    """AdamW's decay rate of the squared gradients' running mean."""
    weight_decay: float = number(0.1, at_least=0)
    """Weight decay of matrices; biases and norms have none."""
    cautious_decay: bool = False
    """Only those weights decay that the step makes smaller anyway (arXiv:2510.12402)."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """The learning rate after the warmup. wsd (warmup-stable-decay): constant, then linear
    decay."""
    warmup_steps: int = number(100, at_least=0)
    """Steps of the warmup, in which the learning rate rises linearly from 0."""
    decay_fraction: float = number(0.2, at_least=0, at_most=1)
    """wsd's decay phase, as a fraction of max_steps."""
    floor: float = number(0.1, at_least=0, at_most=1)
    """The last learning rate of cosine and wsd, as a fraction of the peak learning rate."""

    rates: tuple[str, ...] = ()
    """Factors of the learning rate by patterns of parameters' names, as in 'embed.*=0.1'; the first
    pattern that matches counts."""
    decays: tuple[str, ...] = ()
    """Factors of the weight decay by patterns, as for rates: 'embed.*=0' for none."""
    betas: tuple[str, ...] = ()
    """AdamW's beta1 and beta2 by patterns, as in 'embed.*=0.8,0.95'; other parameters have beta1
    and beta2."""

    def __post_init__(self) -> None:
        check(self, "optimizer.")
        self.rate_factors()
        self.decay_factors()
        self.pairs_of_betas()

    def rate_factors(self) -> dict[str, float]:
        """``rates`` as pattern to factor."""
        wanted = "a factor above 0, such as embed.*=0.1"
        found = _by_pattern(
            self.rates, "rates", wanted, lambda each: len(each) == 1 and each[0] > 0
        )
        return {pattern: factor for pattern, (factor,) in found.items()}

    def decay_factors(self) -> dict[str, float]:
        """``decays`` as pattern to factor."""
        wanted = "a factor of at least 0, such as embed.*=0"
        found = _by_pattern(
            self.decays, "decays", wanted, lambda each: len(each) == 1 and each[0] >= 0
        )
        return {pattern: factor for pattern, (factor,) in found.items()}

    def pairs_of_betas(self) -> dict[str, tuple[float, ...]]:
        """``betas`` as pattern to both."""
        wanted = "two numbers from 0 to below 1, such as embed.*=0.8,0.95"
        return _by_pattern(
            self.betas,
            "betas",
            wanted,
            lambda each: len(each) == 2 and all(0 <= b < 1 for b in each),
        )


def _by_pattern(
    texts: tuple[str, ...], field: str, wanted: str, fits: Callable[[tuple[float, ...]], bool]
) -> dict[str, tuple[float, ...]]:
    """Texts such as ``pattern=1,2`` as pattern to numbers; ``UsageError`` if these do not fit."""
    found = {}
    for text in texts:
        pattern, _, numbers = text.rpartition("=")
        try:
            found[pattern] = tuple(map(float, numbers.split(",")))
            known = bool(pattern) and all(map(math.isfinite, found[pattern]))
            known = known and fits(found[pattern])
        except ValueError:
            known = False
        if not known:
            raise UsageError(
                f"optimizer.{field} has {quoted(text)}, and needs a pattern and {wanted}"
            )
    if len(found) < len(texts):
        raise UsageError(f"optimizer.{field} is {' '.join(texts)}, and has a pattern twice")
    return found


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on the held-out text."""

    every: int = number(250, at_least=1)
    """Steps between evaluations; the last step always has one."""
    windows: int = number(200, at_least=0)
    """How many windows of context_length tokens to evaluate, spread evenly over the held-out text;
    0: all."""
    patience: int = number(0, at_least=0)
    """End the run after this many evaluations in a row without a new lowest validation loss (early
    stopping); 0: never before max_steps."""
    sample_tokens: int = number(200, at_least=0)
    """Length of the sample that each evaluation generates, in tokens; 0: no sample."""
    answers: int = number(16, at_least=0)
    """How many held-out questions to answer, if the data are instructions; 0: none."""
    sample_prompt: str = ""
    """The prompt of the sample; empty: the start of a document."""

    def __post_init__(self) -> None:
        check(self, "evaluation.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = number(0, at_least=0)
    """Steps between checkpoints. Each evaluation writes one too; 0: only those."""
    keep: int = number(2, at_least=1)
    """How many of the newest checkpoints to keep. The best one is always kept."""
    keep_every: int = number(0, at_least=0)
    """Also keep the checkpoints at multiples of this many steps; 0: none."""
    format: Literal["auto", "full", "sharded"] = "auto"
    """full: the first process writes one file; sharded: each process writes its part. auto: sharded
    if an fsdp run's state is more than half of the host's memory, else full."""

    def __post_init__(self) -> None:
        check(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of torchrun divide the work. Each process takes an equal share of a step's
    sequences.
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each process has the whole model; fsdp: the state is sharded over the processes. auto:
    fsdp if the state is more than half of a GPU's memory, else ddp."""
    shard_size: int = number(0, at_least=0)
    """How many processes shard one copy of the state; 0: all. Implies fsdp. The number of processes
    of a node gives hybrid sharding, in which nodes exchange only gradients."""

    def __post_init__(self) -> None:
        check(self, "parallel.")
        if self.shard_size and self.strategy == "ddp":
            raise UsageError(
                f"parallel.shard_size is {self.shard_size}, and parallel.strategy is ddp, which "
                "does not shard; use fsdp"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run logs."""

    every: int = number(10, at_least=1)
    """Steps between lines of metrics.jsonl (and of the output, if it is not a terminal)."""
    wandb: Literal["off", "online", "offline"] = "off"
    """online: send metrics to Weights & Biases; offline: keep them in the run's folder for a later
    sync."""
    wandb_project: str = "gpt"
    """The project at Weights & Biases."""
    profile: int = number(0, at_least=0)
    """Steps to trace with torch.profiler, after two warmup steps; 0: none. The trace is trace.json
    in the run's folder, for Perfetto or chrome://tracing."""

    def __post_init__(self) -> None:
        check(self, "log.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of ``train.py``."""

    run_dir: str = ""
    """The run's folder: configuration, tokenizer, metrics, checkpoints; empty: runs/ and the name
    of the source."""
    resume: bool = False
    """Resume from the run's newest checkpoint; without one, start a new run."""
    init: str = ""
    """Start from the weights of this model, named as for sample.py. Of the model's settings, only
    context_length and dropout can be changed."""
    embeddings: str = ""
    """A text file of word vectors (GloVe, word2vec, fastText): the embeddings of tokens that are
    words in it start from them."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.adapter.kind != "none" and not self.init:
            raise UsageError(
                f"adapter.kind is {self.adapter.kind}, and needs the model to adapt: give init"
            )
        if self.model.context_length == 0 and not self.init:
            raise UsageError(
                "model.context_length is 0, and must be at least 1 (0 is allowed with init, and "
                "keeps that model's context)"
            )
        if not self.init:
            self.model.check_learns()
        kind = self.objective.kind
        if kind != "next_token" and not self.init:
            raise UsageError(f"objective.kind is {kind}, and needs init: the model to start from")
        if self.embeddings and (self.adapter.kind != "none" or kind != "next_token"):
            where = f"objective.kind {kind}"
            if self.adapter.kind != "none":
                where = f"adapter.kind {self.adapter.kind}, whose checkpoints have no embeddings"
            raise UsageError(
                f"embeddings is {quoted(self.embeddings)}, and must be empty with {where}"
            )
        if kind != "next_token" and self.data.mixture:
            raise UsageError(
                f"objective.kind is {kind}, which reads data.source and takes no data.mixture"
            )
        if self.objective.distill and self.training.scheduled_sampling:
            raise UsageError(
                f"training.scheduled_sampling is {self.training.scheduled_sampling}, and must be 0 "
                "with objective.distill"
            )
        if kind != "next_token" and self.training.max_minutes:
            raise UsageError(
                f"training.max_minutes is {self.training.max_minutes:g}, and plans runs of "
                f"objective.kind next_token alone (it is {kind}): give training.max_steps"
            )
        if kind != "next_token" and self.training.scheduled_sampling:
            raise UsageError(
                f"training.scheduled_sampling is {self.training.scheduled_sampling}, and must be 0 "
                f"with objective.kind {kind}"
            )
        if self.training.float8 and (kind != "next_token" or self.adapter.base != "float32"):
            other = f"objective.kind {kind}"
            if self.adapter.base != "float32":
                other = f"adapter.base {self.adapter.base}"
            raise UsageError(f"training.float8 is true, and must be false with {other}")
        if self.training.compile == "whole":
            for setting, why in (
                (self.training.window_start, "training.window_start, whose windows grow"),
                (self.objective.distill, "objective.distill"),
                (kind != "next_token", f"objective.kind {kind}"),
            ):
                if setting:
                    raise UsageError(f"training.compile is whole, and cannot be with {why}; use on")
        micro = self.training.micro_batch_size * self.model.context_length
        if kind == "next_token" and micro and self.training.batch_tokens % micro:
            near = max(1, round(self.training.batch_tokens / micro)) * micro
            raise UsageError(
                f"training.batch_tokens is {self.training.batch_tokens}, and must be a multiple of "
                f"training.micro_batch_size * model.context_length ({micro}); {near} is the nearest"
            )

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir or f"runs/{self.data.name}")

    @property
    def cache_dir(self) -> Path:
        """The folder of the prepared tokens."""
        return Path(self.data.cache_dir) if self.data.cache_dir else self.run / "data"


def run_of(run_dir: str, source: str) -> Path:
    """The run's folder: ``run_dir``; if that is empty, ``runs/`` and the source's name."""
    return Path(run_dir or f"runs/{DataConfig(source=source).name}")
