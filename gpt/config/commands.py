"""What ``sample.py`` and the commands ``prepare``, ``export`` and ``evaluate`` take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt.config.checks import UsageError, check, number
from gpt.config.data import DataConfig
from gpt.config.generation import GenerationConfig
from gpt.config.training import Device

Weights = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]


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
    batch_size: int = number(32, at_least=1)
    """Sequences that go through the model at once, which changes them by rounding alone; beams and
    guesses go one prompt after the other."""
    num_draft_tokens: int = number(0, at_least=0)
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
        check(self)
        if cache := self.data.cache_dir:
            raise UsageError(f"gpt prepare takes no data.cache_dir ({cache!r}); give --out {cache}")


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
        check(self)
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
    """Perplexity and bits per byte of this text: a named corpus, a UTF-8 file, a folder, or
    - for a pipe."""
    lambada: Path | None = None
    """LAMBADA's JSONL file, as OpenAI released it or detokenised."""
    hellaswag: Path | None = None
    """HellaSwag's JSONL file."""
    choices: Path | None = None
    """A JSONL file with context, choices and answer (from 0) on each line."""
    stride: int = number(0, at_least=0)
    """Tokens from one window of the text to the next; 0: half the context."""
    paired: bool = False
    """Of two models on one text: is their difference more than noise?"""
    json: bool = False
    """Print JSON and no table."""
    batch_size: int = number(0, at_least=0)
    """Windows or texts that go through the model at once, for the same scores; 0: what is fast."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    weights: Weights = "auto"
    """Their format, as for sample.py."""

    def __post_init__(self) -> None:
        check(self)
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
