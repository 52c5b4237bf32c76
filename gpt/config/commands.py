"""Options of ``sample.py`` and of the commands ``prepare``, ``export`` and ``evaluate``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt.config.checks import UsageError, check, number, quoted
from gpt.config.data import DataConfig
from gpt.config.generation import CacheFormat, GenerationConfig
from gpt.config.model import RotaryScaling
from gpt.config.training import Device

Duplicates = Literal["keep", "exact", "near"]
Weights = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerationConfig):
    """Options of ``sample.py``."""

    model: str = "runs/shakespeare"
    """A run's folder (uses its best checkpoint), a checkpoint, a folder in Hugging Face's layout, a
    packed folder, a GGUF file, smollm2, or a model on the hub."""
    adapter: str = ""
    """An adapter over the model: the folder of the run that trained it, or one of PEFT."""
    prompt: str | None = None
    """The text to continue. Without it and without prompt_file, the prompt is read from standard
    input; on a terminal, a session starts."""
    prompt_file: Path | None = None
    """A UTF-8 file that contains the prompt; or a .jsonl file with a prompt on each line, which
    needs out."""
    chat: bool = False
    """Hold a conversation: the prompt is a message, and the model answers it. Needs a model with a
    chat template."""
    system: str = ""
    """The system message of the conversation, which tells the model how to answer."""
    out: Path | None = None
    """The .jsonl file for the completions of a .jsonl prompt_file. If it exists, the program
    continues after its last line."""
    batch_size: int = number(32, at_least=1)
    """Maximum number of sequences in one batch; it changes results only by rounding. With num_beams
    or num_draft_tokens, prompts run one after the other."""
    num_draft_tokens: int = number(0, at_least=0)
    """Speculative decoding: tokens to guess, then check in one forward pass; 0: off. It is faster
    if many guesses are right."""
    draft: str = ""
    """A smaller model with the same tokenizer, which makes the guesses. Without it, the guesses are
    what followed the same tokens earlier in the text."""
    explain: tuple[str, ...] | None = None
    """Shade each token by its probability, and list the likeliest alternatives. With the name of an
    .html file: write a page."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    weights: Weights = "auto"
    """Format of the weights: fewer bytes are faster. auto: bfloat16 if the device supports it, else
    float32 (float16 on older GPUs); those of a GGUF file as they are. int8 and int4 round the
    weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("prompt and prompt_file are both given; give only one of them")
        if self.out is not None and self.out == self.prompt_file:
            raise UsageError(f"out is {self.out}, and must be another file than prompt_file")
        if self.takes_many != (self.out is not None):
            raise UsageError(
                f"prompt_file is {_shown(self.prompt_file)} and out is {_shown(self.out)}; "
                "a .jsonl prompt_file needs out, and out needs a .jsonl prompt_file"
            )
        if self.draft and not self.num_draft_tokens:
            raise UsageError(
                f"draft is {self.draft!r} and num_draft_tokens is 0, which makes no guesses; try 5"
            )
        if self.num_draft_tokens and self.num_beams > 1:
            raise UsageError("num_beams and num_draft_tokens are both given; give only one of them")
        if self.explain and (len(self.explain) > 1 or not self.explain[0].endswith(".html")):
            raise UsageError(f"explain is {' '.join(self.explain)!r}, and must be one .html file")
        if self.explain is not None and self.takes_many:
            raise UsageError("explain takes one prompt, and prompt_file is a .jsonl file")
        if self.system and not self.chat:
            raise UsageError(
                f"system is {quoted(self.system)}, and is for conversations: add --chat"
            )
        if self.chat and self.takes_many:
            raise UsageError("chat is a conversation, and prompt_file is a .jsonl file of prompts")
        if self.chat and self.num_samples != 1:
            raise UsageError(f"num_samples is {self.num_samples}, and must be 1 with chat")

    @property
    def takes_many(self) -> bool:
        """Whether prompt_file is a .jsonl file of prompts."""
        return self.prompt_file is not None and self.prompt_file.suffix == ".jsonl"


def _shown(path: Path | None) -> str:
    return "not given" if path is None else str(path)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of ``gpt prepare``."""

    sources: tuple[str, ...]
    """Files, folders, patterns, named corpora, - for a pipe, hf://OWNER/NAME; without any,
    data.source."""
    out: Path = Path("data")
    """The folder to write. It becomes the data.source of train.py. A preparation that was stopped
    goes on from there."""
    validation: Literal["auto", "documents", "end"] = "auto"
    """What is held out; documents: those that the hashes of their texts choose; end: the end of
    the text; auto: documents if there are at least 100."""
    duplicates: Duplicates = "keep"
    """Documents that came before; exact: drop those with the same words; near: also those with
    almost the same (needs datasketch)."""
    engine: Literal["local", "ray"] = "local"
    """local: the cores of this machine; ray: a file of the sources on each worker of a Ray cluster
    (RAY_ADDRESS), which share the folder."""
    shard_tokens: int = number(100_000_000, at_least=1)
    """Tokens in a file."""
    workers: int = number(0, at_least=0)
    """Threads that encode; 0: one for each core. The files do not depend on it."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check(self)
        if cache := self.data.cache_dir:
            raise UsageError(f"gpt prepare takes no data.cache_dir ({cache!r}); give --out {cache}")
        if self.data.mixture:
            raise UsageError(
                "gpt prepare takes no data.mixture: train.py prepares its sources, with one "
                "tokenizer for all"
            )


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Options of ``gpt inspect``."""

    path: Path
    """What gpt prepare wrote, a run's folder, or other projects' files of GPT-2's token ids."""
    documents: int = number(3, at_least=0)
    """How many of the first documents to show."""
    characters: int = number(200, at_least=1)
    """How much of each."""
    frequent: int = number(10, at_least=0)
    """How many of the most frequent tokens to show."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``gpt export``."""

    model: str
    """The model, as in sample.py --model."""
    out: Path
    """The folder or file to write; it must not exist."""
    adapter: str = ""
    """An adapter over the model: the folder of the run that trained it, or one of PEFT."""
    to: Literal["huggingface", "packed", "gguf", "peft"] = "huggingface"
    """huggingface: a folder for from_pretrained of transformers; packed: weights converted for
    inference; gguf: a file for llama.cpp; peft: the adapter alone, for the library PEFT."""
    weights: Weights = "auto"
    """Format of packed weights, as in sample.py; of a GGUF file, with auto as in the model."""
    family: str = "auto"
    """Family of Hugging Face's layout: gpt2, llama, and so on (docs/models.md has the list). auto:
    the first that can express the model."""

    def __post_init__(self) -> None:
        check(self)
        if self.to == "peft" and not self.adapter:
            raise UsageError("to is peft, and writes an adapter: give adapter as well")
        if self.to not in ("huggingface", "peft") and self.family != "auto":
            raise UsageError(f"family is {quoted(self.family)}, and needs --to huggingface")
        if self.to in ("huggingface", "peft") and self.weights != "auto":
            raise UsageError(
                f"weights is {self.weights!r}, and Hugging Face's layout keeps the format of the "
                "model; a format needs --to packed or --to gguf"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of ``gpt evaluate``."""

    models: tuple[str, ...]
    """One or more models, as in sample.py --model."""
    adapter: str = ""
    """An adapter over each model: the folder of the run that trained it, or one of PEFT."""
    text: str = ""
    """Measure perplexity and bits per byte of this text: a named corpus, a UTF-8 file, a folder, or
    - for a pipe."""
    held_out: bool = False
    """Measure them on the part of the text that the runs have held out, in windows of the whole
    context without overlap, as in training; also the default with ensemble."""
    lambada: Path | None = None
    """LAMBADA's JSONL file, as released by OpenAI or detokenised."""
    hellaswag: Path | None = None
    """HellaSwag's JSONL file."""
    choices: Path | None = None
    """A JSONL file of multiple-choice questions: context, choices and answer (from 0) on each
    line."""
    context_length: int = number(0, at_least=0)
    """Length of a window of the text, in tokens; also reports the loss by position in the window.
    It may exceed the model's context if its positions are not learned. 0: the model's context."""
    rotary_scaling: Literal["model", RotaryScaling] = "model"
    """How rotary positions are extended to context_length. model: as the model has it."""
    rotary_scaling_factor: float = number(0.0, at_least=0)
    """As model.rotary_scaling_factor; 0: context_length over the trained length."""
    stride: int = number(0, at_least=0)
    """Distance between windows of the text, in tokens; 0: half the context, or context_length
    if that is given; with held_out the context."""
    cache: CacheFormat = "float"
    """int8: the model reads the text's keys and values after their rounding to 8 bits, as with
    sample.py --cache int8. float: as they are."""
    paired: bool = False
    """Test whether the difference of two models on one text is more than noise."""
    ensemble: bool = False
    """Also score the models together on the text: their probabilities of each token are
    averaged."""
    json: bool = False
    """Print JSON instead of a table."""
    batch_size: int = number(0, at_least=0)
    """Windows or texts in one batch; it does not change the scores; 0: a fast value."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    weights: Weights = "auto"
    """Format of the weights, as in sample.py."""

    def __post_init__(self) -> None:
        check(self)
        if self.ensemble and not self.text:
            object.__setattr__(self, "held_out", True)
        some = self.scores_text or self.lambada or self.hellaswag or self.choices
        if not some:
            raise UsageError(
                "nothing to evaluate on: give text, held_out, lambada, hellaswag or choices"
            )
        if self.text and self.held_out:
            raise UsageError("text and held_out are both given; give only one of them")
        if self.ensemble and len(self.models) < 2:
            raise UsageError("ensemble scores several models together: give two or more models")
        if not self.models:
            raise UsageError("models is empty: name one or more models before the options")
        if len(set(self.models)) < len(self.models):
            raise UsageError(f"models are {', '.join(self.models)}, and must all be different")
        if self.context_length and not self.scores_text:
            raise UsageError("context_length is for windows of a text: give text as well")
        if self.rotary_scaling != "model" and not self.context_length:
            raise UsageError("rotary_scaling is for longer windows: give context_length as well")
        if self.rotary_scaling_factor and self.rotary_scaling in ("model", "none"):
            raise UsageError(
                f"rotary_scaling_factor is {self.rotary_scaling_factor:g}, and needs a "
                "rotary_scaling"
            )
        if self.cache != "float" and not self.scores_text:
            raise UsageError(
                f"cache is {self.cache!r}, and is measured on a text: give text as well"
            )
        if self.paired and not (len(self.models) == 2 and self.scores_text):
            raise UsageError(
                "paired compares two models on one text: give exactly two models, and text"
            )

    @property
    def scores_text(self) -> bool:
        """Whether there is a text to score."""
        return bool(self.text) or self.held_out
