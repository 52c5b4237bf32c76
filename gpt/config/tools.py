"""Options of ``gpt doctor``, ``gpt plan`` and ``gpt report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.config.checks import UsageError, check, number, quoted
from gpt.config.training import Device, TrainConfig

Gpu = Literal[
    "none", "a100", "a100-40gb", "b200", "h100", "h100-pcie", "h200", "l4", "l40s",
    "rtx3090", "rtx4090", "rtx5090",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Options of ``gpt doctor``."""

    hub: bool = True
    """Ask whether the Hugging Face hub answers."""
    json: bool = False
    """Print JSON."""
    folder: Path = Path()
    """The folder whose disk is looked at: where runs will be written."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Options of ``gpt plan``: those of ``train.py``, and these."""

    gpu: Gpu = "none"
    """Plan for this kind of GPU; none: for this machine."""
    gpus: int = number(1, at_least=1)
    """How many of them."""
    node: int = number(8, at_least=1)
    """GPUs in one machine."""
    mfu: float = number(0.4, above=0, at_most=1)
    """The part of a GPU's peak that training reaches (model FLOPs utilisation). Large models reach
    0.4 to 0.5."""
    measure: bool = True
    """Measure the time of a step on this machine."""
    seconds: float = number(10.0, above=0)
    """How long to measure."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus > 1 and self.gpu == "none":
            raise UsageError(f"gpus is {self.gpus}, and needs their kind: --gpu h100")
        if self.objective.kind != "next_token":
            raise UsageError(
                f"objective.kind is {self.objective.kind}, and gpt plan knows only next_token"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of ``gpt report``."""

    runs: tuple[str, ...]
    """Folders of runs, or their metrics.jsonl; they are drawn over each other."""
    out: Path = Path("report.html")
    """The page to write."""
    png: Path | None = None
    """Also write the curves as one picture."""
    x: Literal["step", "tokens", "time"] = "step"
    """What the curves are drawn over first; the page has all three."""
    text: Path | None = None
    """Instead of curves: this text under the one model that runs names, each token shaded by its
    probability."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU; for text."""

    def __post_init__(self) -> None:
        check(self)
        if not self.runs:
            raise UsageError("runs is empty, and must be the folders of one or more runs")
        if self.text is not None and (len(self.runs) > 1 or self.png is not None):
            raise UsageError("text is shown under one model, as a page: give one run, and no png")
        if self.out.suffix != ".html":
            raise UsageError(f"out is {quoted(str(self.out))}, and must be an .html file")
        if self.png is not None and self.png.suffix != ".png":
            raise UsageError(f"png is {quoted(str(self.png))}, and must be a .png file")
