"""Options of ``gpt doctor``, ``gpt plan`` and ``gpt report``."""

from dataclasses import dataclass
from pathlib import Path

from gpt.config.checks import check


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
