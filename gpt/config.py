"""Every setting of a run: dataclasses, their checks, and the one way in from TOML and command line.

``dataclass defaults < TOML < command line``. The TOML is flattened into ``--group.field=value``
tokens that go before the user's own, so both meet the same parser (tyro), the same types and the
same "perhaps you meant". Nothing here imports torch: ``--help`` answers at once.
"""

import argparse
import dataclasses
import json
import math
import numbers
import operator
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
Activation = Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"]
TokenizerKind = Literal["char", "byte", "gpt2"]
PositionScheme = Literal["learned"]
Norm = Literal["layer"]
NormPlacement = Literal["pre"]
Mlp = Literal["plain"]


MESSAGE = 800
"""Characters of a message; what it quotes is at most :data:`FOREIGN`."""
FOREIGN = 300


class UsageError(ValueError):
    """A mistake of the user's: its message is one sentence that says what, where, and what is
    right.

    What is not printable in it is escaped, and its middle is left out if it is very long: a message
    may quote a file of any content.
    """

    def __init__(self, message: str) -> None:
        text = "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in message[:10_000])
        if len(text) > MESSAGE:
            text = f"{text[: MESSAGE // 2]} ... {text[-MESSAGE // 2 :]}"
        super().__init__(text)


def foreign(value: object) -> str:
    """Text of someone else's for a message: a path, a value, another program's error. What is not
    printable is escaped, and its middle is left out if it is long.
    """
    text = str(value)
    if len(text) > FOREIGN:
        text = f"{text[: FOREIGN // 2]} ... {text[-FOREIGN // 2 + 5 :]}"
    text = "".join(c if c.isprintable() else _escaped(c) for c in text)
    return text if len(text) <= FOREIGN else text[: FOREIGN - 4] + " ..."


def quoted(value: object) -> str:
    """A value as Python writes it, for a message."""
    try:
        return foreign(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"of {type(value).__name__}, and too long to show"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True)
class Bounds:
    """What a number may be."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        words = {"at least": self.at_least, "above": self.above}
        words |= {"at most": self.at_most, "below": self.below}
        said = [f"{word} {bound:.15g}" for word, bound in words.items() if math.isfinite(bound)]
        return " and ".join(said) or "a number"


def _number(default: Any, **bounds: float) -> Any:
    """A field with this default, whose value is within the :class:`Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def _check(config: Any, group: str = "") -> None:
    """Whoever made the configuration, each field has a value of its type, within its bounds or
    among its choices; ``UsageError`` names the first that has not.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{group}{item.name}"
        wanted = _KINDS.get(item.type)
        if get_origin(item.type) is Literal:
            if not (isinstance(value, str) and value in get_args(item.type)):
                choices = ", ".join(get_args(item.type))
                raise UsageError(f"{name} is {quoted(value)}, and must be one of {choices}")
        elif isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            if not isinstance(value, item.type):
                kind = item.type.__name__
                raise UsageError(f"{name} is {quoted(value)}, and must be a {kind}")
        elif wanted is not None and (
            not isinstance(value, wanted[0]) or (isinstance(value, bool) and item.type is not bool)
        ):
            raise UsageError(f"{name} is {quoted(value)}, and must be {wanted[1]}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            bounds: Bounds = item.metadata.get("bounds", Bounds())
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise UsageError(f"{name} has {value.bit_length():,} bits, and must be below 2**63")
            if value not in bounds:
                raise UsageError(f"{name} is {value}, and must be {bounds}")
        if isinstance(value, str | Path):
            _check_text(name, str(value))


_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
    int | None: (int | None, "a whole number"),
    str | None: (str | None, "a text"),
    Path: (Path, "a path"),
    Path | None: (Path | None, "a path"),
}


def token_ids(what: str, ids: Iterable[Any]) -> list[int]:
    """``ids``, of whatever type of integers, as Python's own; ``UsageError`` for anything else."""
    try:
        if isinstance(ids, str | bytes):
            raise TypeError
        items = list(ids)
    except TypeError:
        raise UsageError(f"{what} is {quoted(ids)}, and must be a list of token ids") from None
    for i, item in enumerate(items):
        try:
            if isinstance(item, bool):
                raise TypeError
            items[i] = operator.index(item)
        except (TypeError, RuntimeError):  # RuntimeError: of a tensor without data
            raise UsageError(f"{what} has {quoted(item)} in it, which is no token id") from None
    return items


def unescaped(text: str) -> str:
    r"""A text that was typed: ``\n`` is a newline, ``\t`` a tab, and ``\\`` a backslash."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], "\\"), text)


def _check_text(name: str, text: str) -> None:
    """A text that goes into a TOML file and to the system is Unicode without NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} is {foreign(text)}, which is not UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{name} is {foreign(text)}, which has a NUL in it")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a :class:`gpt.GPT`. The defaults are GPT-2's smallest model, for ever."""

    vocab_size: int = _number(50257, at_least=0)
    """Rows of the token embedding. In a run, 0 takes the tokenizer's (from 1,024 tokens on, padded
    to a multiple of 128 for GPUs), and a larger number pads it."""
    context_length: int = _number(1024, at_least=0)
    """The most tokens the model sees at once. In a run with init, 0 keeps the model's own."""
    n_layer: int = _number(12, at_least=1)
    """Blocks, each of attention and a feed-forward layer."""
    n_head: int = _number(12, at_least=1)
    """Attention heads in a block; they share n_embd."""
    n_kv_head: int = _number(0, at_least=0)
    """Heads of keys and values (grouped-query attention); 0: as many as n_head."""
    head_dim: int = _number(0, at_least=0)
    """Width of one attention head; 0: n_embd / n_head."""
    n_embd: int = _number(768, at_least=1)
    """Width of the residual stream."""
    position: PositionScheme = "learned"
    """How tokens know their positions. learned: an embedding for each."""
    norm: Norm = "layer"
    """layer: LayerNorm."""
    norm_placement: NormPlacement = "pre"
    """pre: before each branch."""
    mlp: Mlp = "plain"
    """plain: up, activation, down."""
    dropout: float = _number(0.0, at_least=0, below=1)
    """Probability of dropping an embedding, an attention weight or a residual branch's output."""
    bias: bool = True
    """Biases in the linear layers and the norms."""
    tie_embeddings: bool = True
    """One matrix for the token embedding and the head."""
    norm_eps: float = _number(1e-5, above=0)
    """Epsilon of the LayerNorms."""
    n_inner: int = _number(0, at_least=0)
    """Width inside the feed-forward layers; 0: four times n_embd."""
    activation: Activation = "gelu_tanh"
    """What the feed-forward layers apply in their middle."""
    scale_attention: bool = True
    """Divide attention scores by the square root of the head's width."""
    scale_attention_by_layer: bool = False
    """Divide attention scores by the number of the layer, from 1, as well."""

    def __post_init__(self) -> None:
        _check(self, "model.")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UsageError(
                f"model.n_embd is {self.n_embd}, and must be a multiple of "
                f"model.n_head ({self.n_head})"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise UsageError(
                f"model.n_kv_head is {self.n_kv_head}, and must divide model.n_head ({self.n_head})"
            )

    def resolved(self) -> Self:
        """The same shape with every 0 that stands for another number replaced by that number."""
        return dataclasses.replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            n_inner=self.n_inner or 4 * self.n_embd,
        )


_DESCRIPTOR = re.compile(r"-|/dev/stdin|/(?:dev|proc/self)/fd/([0-9]{1,9})")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "shakespeare"
    """A named corpus (shakespeare), a UTF-8 text file, a folder of them, or - for a pipe."""
    tokenizer: TokenizerKind = "char"
    """char: the corpus's characters; byte: 256 bytes; gpt2: GPT-2's byte-pair encoding."""
    validation_fraction: float = _number(0.05, above=0, below=1)
    """The share at the end of the text that is held out."""
    cache_dir: str = ""
    """Where prepared tokens are kept and found again; empty: data/ in the run's folder."""

    def __post_init__(self) -> None:
        _check(self, "data.")

    @property
    def descriptor(self) -> int | None:
        """The open file that ``source`` means: 0 for ``-``, N for ``/dev/fd/N``; ``None`` for a
        name.
        """
        match = _DESCRIPTOR.fullmatch(self.source)
        return int(match[1] or 0) if match else None

    @property
    def name(self) -> str:
        """The text's name, for the folders that are made from it."""
        if self.descriptor is not None:
            return "piped"
        path = Path(self.source)
        if path.name in ("", ".."):  # the folder that . or .. means
            path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() fails for some links
        return path.stem or "text"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, and on what."""

    max_steps: int = _number(10_000, at_least=1)
    """Optimizer updates in all."""
    batch_tokens: int = _number(16_384, at_least=1)
    """Tokens that one step consumes; accumulation follows from it and micro_batch_size."""
    micro_batch_size: int = _number(16, at_least=1)
    """Sequences that go through the model at once."""
    gradient_clip: float = _number(1.0, at_least=0)
    """Largest norm of the gradient; 0: no clipping."""
    seed: int = _number(1337, at_least=0)
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
    skip_nonfinite: int = _number(0, at_least=0)
    """Updates to skip in a run, and count, whose loss or gradient is not finite; one more stops
    it."""

    def __post_init__(self) -> None:
        _check(self, "training.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for everything else."""
    learning_rate: float = _number(6e-4, above=0)
    """AdamW's highest learning rate."""
    muon_learning_rate: float = _number(0.02, above=0)
    """Muon's highest learning rate, scaled by the shape of each matrix."""
    beta1: float = _number(0.9, at_least=0, below=1)
    """AdamW's decay of the mean of gradients."""
    beta2: float = _number(0.95, at_least=0, below=1)
    """AdamW's decay of the mean of squared gradients."""
    weight_decay: float = _number(0.1, at_least=0)
    """On matrices only: never on biases and norms."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warmup; wsd (warmup-stable-decay) holds, then falls in a line."""
    warmup_steps: int = _number(100, at_least=0)
    """Steps over which the learning rate rises in a line from 0."""
    decay_fraction: float = _number(0.2, at_least=0, at_most=1)
    """Of max_steps: wsd's last part, in which the learning rate falls."""
    floor: float = _number(0.1, at_least=0, at_most=1)
    """What cosine and wsd end at, as a fraction of the highest learning rate."""

    def __post_init__(self) -> None:
        _check(self, "optimizer.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the held-out text, and when."""

    every: int = _number(250, at_least=1)
    """Steps between evaluations; there is always one at the end."""
    windows: int = _number(200, at_least=0)
    """Fixed windows of context_length tokens, spread evenly over the held-out text; 0: all."""
    sample_tokens: int = _number(200, at_least=0)
    """Length of the sample of text that goes with each evaluation; 0: none."""
    sample_prompt: str = ""
    """What the sample continues; empty: the start of a document."""

    def __post_init__(self) -> None:
        _check(self, "evaluation.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run's state is kept."""

    every: int = _number(0, at_least=0)
    """Steps between checkpoints beside those of each evaluation; 0: no others."""
    keep: int = _number(2, at_least=1)
    """The newest checkpoints that stay; the best one always does."""
    keep_every: int = _number(0, at_least=0)
    """Checkpoints at multiples of this many steps stay too; 0: no others."""
    format: Literal["auto", "full", "sharded"] = "auto"
    """full: one file, through the first process; sharded: each process writes its part. auto: full,
    unless an fsdp run's state is more than half of the host's memory."""

    def __post_init__(self) -> None:
        _check(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of torchrun divide the work: each takes an equal share of a step's
    sequences.
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: a whole model in each; fsdp: the state is shared out between them. auto: ddp, unless the
    state is more than half of a GPU's memory."""
    shard_size: int = _number(0, at_least=0)
    """fsdp, which it implies: how many processes share one copy of the state; 0: all. As many as a
    node has is hybrid sharding: between nodes go gradients alone."""

    def __post_init__(self) -> None:
        _check(self, "parallel.")
        if self.shard_size and self.strategy == "ddp":
            raise UsageError(
                f"parallel.shard_size is {self.shard_size}, and parallel.strategy ddp shares out "
                "nothing: fsdp does"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells while it goes."""

    every: int = _number(10, at_least=1)
    """Steps between lines of metrics.jsonl (and of plain output)."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send metrics to Weights & Biases, or keep them in the run's folder for a later sync."""
    wandb_project: str = "gpt"
    """The project there."""
    profile: int = _number(0, at_least=0)
    """Steps to trace with torch.profiler, after two that warm up: trace.json in the run's folder,
    for Perfetto or chrome://tracing; 0: none."""

    def __post_init__(self) -> None:
        _check(self, "log.")


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
        _check(self)
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


_MOST_BIAS = 1e30
"""Far beyond any logit, and a number in bfloat16 and float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. What is set applies in the order of the fields, but for the
    temperature, which comes between the penalties and top_k.
    """

    temperature: float = _number(0.8, at_least=0)
    """Divides the logits: below 1 is safer, above 1 is wilder; 0 takes the likeliest token."""
    bias: dict[int, float] = field(default_factory=dict)
    """Token ids, each with a number that is added to its logit."""
    ban: tuple[int, ...] = ()
    """Token ids that are never written."""
    repetition_penalty: float = _number(1.0, above=0)
    """Divides the logits of tokens that the prompt or the text has already; above 1 discourages."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written already."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens for each time that they were written."""
    top_k: int = _number(0, at_least=0)
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = _number(1.0, above=0, at_most=1)
    """Draw among the fewest likeliest tokens whose probabilities reach p."""
    min_p: float = _number(0.0, at_least=0, at_most=1)
    """Draw among the tokens that are at least p times as likely as the likeliest."""

    def __post_init__(self) -> None:
        _check(self)
        if 0 < self.temperature < 1e-5:
            raise UsageError(
                f"temperature is {self.temperature}, and must be 0 (the likeliest token) or at "
                "least 1e-05"
            )
        if not isinstance(self.bias, Mapping):
            raise UsageError(
                f"bias is {quoted(self.bias)}, and must map token ids to numbers, as in {{5: -1.0}}"
            )
        bias: dict[int, Any] = dict(
            zip(token_ids("bias", self.bias), self.bias.values(), strict=True)
        )
        for token, number in bias.items():
            is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
            if not (is_number and abs(number) < math.inf):
                raise UsageError(
                    f"bias has {quoted(number)} for the token {quoted(token)}, and must have a "
                    "number (ban takes what is never to be written)"
                )
            if abs(number) > _MOST_BIAS:
                raise UsageError(
                    f"bias has {quoted(number)} for the token {quoted(token)}, and must be from "
                    f"{-_MOST_BIAS:g} to {_MOST_BIAS:g}"
                )
        bias = {token: float(number) for token, number in bias.items()}
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "ban", tuple(token_ids("ban", self.ban)))

    @property
    def has_penalties(self) -> bool:
        """Whether what was written already matters."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How a prompt is continued."""

    max_new_tokens: int = _number(500, at_least=1)
    """The most tokens to write for each sample."""
    min_new_tokens: int = _number(0, at_least=0)
    """Tokens before which a document does not end."""
    num_samples: int = _number(1, at_least=1)
    """Continuations of the same prompt; it goes through the model once."""
    num_beams: int = _number(1, at_least=1)
    """Beams of a beam search, which draws nothing: samples are the best ones; 1: no search."""
    length_penalty: float = _number(1.0, at_least=-20, at_most=20)
    """Divides a beam's log-probability by its length to this power: above 0 favours long ones."""
    early_stopping: Literal["likely", "first", "never"] = "likely"
    """When a beam search ends: as soon as no better beam is likely, with the first num_beams that
    are complete, or never before no better one is possible."""
    stop: tuple[str, ...] = ()
    """One or more texts at which a sample ends; they are not shown. On the command line \\n is a
    newline, \\t a tab, and \\\\ a backslash."""
    past_context: Literal["slide", "stop"] = "slide"
    """When the context is full: slide re-reads its newer half and goes on, stop ends the text."""
    logprobs: int | None = _number(None, at_least=0)
    """Give log-probabilities as well, in Python and in the lines of out: of each token, and of this
    many likeliest ones."""
    seed: int | None = _number(None, at_least=0)
    """Of the draws: the same seed gives a prompt the same text. Without it, a new one each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            raise UsageError(
                f"num_samples is {self.num_samples}, and a search of {self.num_beams} beams gives "
                "no more than these"
            )
        stop: Any = self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        if not (isinstance(stop, Sequence) and all(isinstance(text, str) for text in stop)):
            raise UsageError(f"stop is {quoted(stop)}, and must be one or more texts")
        object.__setattr__(self, "stop", tuple(stop))
        if "" in self.stop:
            raise UsageError("stop has an empty text in it, and each must have a character")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerationConfig):
    """Everything that ``sample.py`` takes."""

    model: str = "runs/shakespeare"
    """A run's folder (its best checkpoint is taken), one checkpoint of it, a folder in Hugging
    Face's layout, or a GPT-2 on the hub."""
    prompt: str | None = None
    """The text to continue. Without it and prompt_file, a terminal asks for prompts."""
    prompt_file: Path | None = None
    """A UTF-8 file whose text is the prompt; or a .jsonl file with a prompt on each line, whose
    completions go to out."""
    out: Path | None = None
    """The .jsonl file for the completions of prompt_file's lines; goes on where it ends."""
    batch_size: int = _number(32, at_least=1)
    """Sequences that go through the model at once, which changes them by rounding alone; beams and
    guesses go one prompt after the other."""
    num_draft_tokens: int = _number(0, at_least=0)
    """Tokens to guess and then read at once; 0: none. It is faster where many guesses are right."""
    draft: str = ""
    """A smaller model with the same tokenizer that guesses; without one, the text itself is looked
    through for what followed the same tokens before."""
    explain: tuple[str, ...] | None = None
    """Shade each token by its probability and list what was expected instead; given the name of an
    .html file, as a page."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    weights: Weights = "auto"
    """Their format: the fewer bytes, the faster. auto: bfloat16 where the device has it, else
    float32 (float16 on older GPUs); int8 and int4 round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("prompt and prompt_file are both given, and only one can be it")
        if self.out is not None and self.out == self.prompt_file:
            raise UsageError(f"out is {self.out}, which is prompt_file as well")
        if self.takes_many != (self.out is not None):
            raise UsageError(
                "a .jsonl file as prompt_file and the file out for its completions go together, "
                f"and prompt_file is {_shown(self.prompt_file)}, out {_shown(self.out)}"
            )
        if self.draft and not self.num_draft_tokens:
            raise UsageError(
                f"draft is {self.draft!r}, and num_draft_tokens is 0; 5 is a good number"
            )
        if self.num_draft_tokens and self.num_beams > 1:
            raise UsageError("num_beams and num_draft_tokens are both given, and only one can be")
        if self.explain and (len(self.explain) > 1 or not self.explain[0].endswith(".html")):
            raise UsageError(f"explain is {' '.join(self.explain)!r}, and must be one .html file")
        if self.explain is not None and self.takes_many:
            raise UsageError("explain shows one prompt, and prompt_file has many")

    @property
    def takes_many(self) -> bool:
        """Whether prompt_file has a prompt on each line."""
        return self.prompt_file is not None and self.prompt_file.suffix == ".jsonl"


def _shown(path: Path | None) -> str:
    return "not given" if path is None else str(path)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything that ``gpt prepare`` takes."""

    out: Path = Path("data")
    """The cache folder: give it to train.py as --data.cache_dir."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything that ``gpt export`` takes."""

    model: str
    """Whatever sample.py takes as --model."""
    out: Path
    """The new folder to write."""
    to: Literal["huggingface", "packed"] = "huggingface"
    """The layout: what from_pretrained of transformers reads; or weights that are packed to run."""
    weights: Weights = "auto"
    """The format of packed weights, as for sample.py."""

    def __post_init__(self) -> None:
        _check(self)
        if self.to == "huggingface" and self.weights != "auto":
            raise UsageError(
                f"weights is {self.weights!r}, and Hugging Face's layout has them as they are "
                "stored; to packed takes a format"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that ``gpt evaluate`` takes."""

    models: tuple[str, ...]
    """Any number of models, each named as for sample.py."""
    text: str = ""
    """Perplexity and bits per byte of this text: a named corpus, a UTF-8 file, or a folder."""
    lambada: Path | None = None
    """LAMBADA's JSONL file, as OpenAI released it or detokenised."""
    hellaswag: Path | None = None
    """HellaSwag's JSONL file."""
    choices: Path | None = None
    """A JSONL file with context, choices and answer (from 0) on each line."""
    stride: int = _number(0, at_least=0)
    """Tokens from one window of the text to the next; 0: half the context."""
    paired: bool = False
    """Of two models on one text: is their difference more than noise?"""
    json: bool = False
    """Print JSON and no table."""
    batch_size: int = _number(0, at_least=0)
    """Windows or texts that go through the model at once, for the same scores; 0: what is fast."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    weights: Weights = "auto"
    """Their format, as for sample.py."""

    def __post_init__(self) -> None:
        _check(self)
        if not (self.text or self.lambada or self.hellaswag or self.choices):
            raise UsageError(
                "there is nothing to evaluate on: give text, lambada, hellaswag or choices"
            )
        if not self.models:
            raise UsageError("models is empty: name one model or more, before the options")
        if len(set(self.models)) < len(self.models):
            raise UsageError(f"models are {', '.join(self.models)}, and each must be another one")
        if self.paired and not (len(self.models) == 2 and self.text):
            raise UsageError(
                "paired compares two models on one text, and needs both models and text"
            )


T = TypeVar("T")


def parse(schema: type[T], arguments: Sequence[str], *, prog: str, toml: Path | None = None) -> T:
    """The configuration that ``toml`` and then the command line make of the defaults of ``schema``.

    ``arguments`` are the words behind the program's name; a leading ``*.toml`` among them takes the
    place of ``toml``. Wrong words end the process with status 2 and tyro's account of them.
    """
    import tyro

    words = list(arguments)
    if words and words[0].endswith(".toml"):
        toml = Path(words.pop(0))
        prog = f"{prog} {toml}"
    tokens = toml_tokens(toml) if toml else []
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def optional(info: Any) -> Any:
        """``X | None`` takes any text, "None" too: ``None`` is what stands without the option."""
        if info.type not in (str | None, Path | None, tuple[str, ...] | None):
            return None
        [kind] = (each for each in get_args(info.type) if each is not type(None))
        names: dict[Any, str] = {str: "STR", Path: "PATH"}
        one = kind in names
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1 if one else "*",
            metavar=names.get(kind, "[STR [STR ...]]"),
            instance_from_str=lambda words: kind(words[0]) if one else tuple(words),
            is_instance=lambda value: value is None or isinstance(value, kind if one else tuple),
            str_from_instance=lambda value: [str(value)] if one or value is None else list(value),
        )

    return tyro.cli(
        schema,
        prog=prog,
        args=[*tokens, *words],
        use_underscores=True,
        config=(tyro.conf.PositionalRequiredArgs,),
        registry=registry,
    )


def parse_training(
    arguments: Sequence[str], *, prog: str, default: Path, init: Path
) -> tuple[TrainConfig, Path]:
    """The configuration of ``train.py``, and the TOML file that it comes from: the one that is
    named; else, for a run that is resumed, the run's own; else the preset ``init`` for a model that
    is not new; else ``default``.

    A ``config.toml`` in a run's folder means that folder, wherever it was when it was written.
    """
    words = list(arguments)
    if words and words[0].endswith(".toml"):
        path = Path(words[0])
        if path.name == "config.toml" and (path.parent / "tokenizer.json").is_file():
            words[1:1] = ["--run_dir", str(path.parent)]
        return parse(TrainConfig, words, prog=prog), path
    given = _peek(words)
    run = run_of(given.run_dir, given.source)
    if given.resume and (run / "config.toml").is_file():
        path = run / "config.toml"
        words = ["--run_dir", str(run), *words]
    else:
        path = init if given.init else default
    return parse(TrainConfig, words, prog=prog, toml=path), path


def _peek(words: Sequence[str]) -> argparse.Namespace:
    """What must be known of the command line before the rest of it is understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run_dir", "--run-dir", default="")
    parser.add_argument("--data.source", dest="source", default=DataConfig().source)
    parser.add_argument("--init", default="")
    parser.add_argument("--resume", action="store_true")
    try:
        return parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError:  # a value is missing: `parse` says so
        return parser.parse_args([])


def run_of(run_dir: str, source: str) -> Path:
    """The run's folder: ``run_dir``, or else one in ``runs/`` with the source's name."""
    return Path(run_dir or f"runs/{DataConfig(source=source).name}")


def toml_tokens(path: Path) -> list[str]:
    """The command-line words that say what the TOML file at ``path`` says."""
    what = f"the configuration {foreign(path)}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{what} is a folder, a pipe or a device, and must be a file")
        words = list(_tokens(tomllib.loads(path.read_bytes().decode("utf-8-sig"))))
        if broken := [word for word in words if "\0" in word]:
            raise ValueError(f"{foreign(broken[0])} has a NUL in it")
        return words
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply") from None
    except ValueError as error:  # also of UTF-8, and of an integer of thousands of digits
        raise UsageError(f"{what} is not valid TOML: {foreign(error)}") from None


def _tokens(table: Mapping[str, Any], group: str = "") -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _tokens(value, f"{group}{name}.")
        elif isinstance(value, bool):
            yield f"--{group}{name}" if value else f"--{group}no_{name}"
        elif isinstance(value, list):
            yield f"--{group}{name}"
            yield from map(str, value)
        else:
            yield f"--{group}{name}={value}"


def to_toml(config: Any) -> str:
    """A configuration with every field, as TOML that :func:`parse` reads back to an equal one."""
    lines, groups = [], []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            groups.append(f"\n[{item.name}]\n{to_toml(value)}")
        else:
            lines.append(f"{item.name} = {_toml_value(value)}\n")
    return "".join(lines + groups)


def _toml_value(value: object) -> str:
    # JSON's strings, booleans and integers are TOML's, but for DEL, which TOML wants escaped.
    text = str(value) if isinstance(value, Path) else value
    return repr(text) if isinstance(text, float) else json.dumps(text).replace("\x7f", "\\u007f")
