"""Options of ``gpt serve``."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from gpt.config.checks import UsageError, check, number, quoted
from gpt.config.commands import Weights
from gpt.config.training import Device


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of ``gpt serve``."""

    model: str
    """The model, as in sample.py --model."""
    host: str = "127.0.0.1"
    """The address to listen on. Another one than this machine's own needs an API key."""
    port: int = number(8000, at_least=0, at_most=65535)
    """The port to listen on; 0: a free one."""
    api_key: str = ""
    """Requests must have this key (Authorization: Bearer KEY). Other users of the machine can read
    a command line: better set GPT_API_KEY in the environment."""
    name: str = ""
    """What clients call the model. Without it: the last part of model."""
    batch_size: int = number(0, at_least=0)
    """Maximum number of sequences that are continued at once; 0: 16, or fewer where the memory is
    small."""
    queue: int = number(64, at_least=0)
    """Maximum number of requests that wait for a place in the batch. Further ones get status
    429."""
    max_length: int = number(0, at_least=0)
    """Maximum number of tokens of a prompt and its answer together; 0: the model's context."""
    max_body: int = number(4_000_000, at_least=1)
    """Maximum size of a request, in bytes."""
    max_seconds: float = number(600.0, above=0)
    """A request that takes longer is ended."""
    prefix_cache: int = number(256, at_least=0)
    """Memory for what earlier requests began with, in MiB. A conversation's next turn reads only
    what is new."""
    cache: Literal["float", "bfloat16", "int8"] = "float"
    """Format of keys and values. float: the weights' own; bfloat16: half of float32, on processors
    with instructions for it; int8: 8 bits, which rounds them."""
    allow_origin: tuple[str, ...] = ()
    """Web pages that may use the server, such as https://example.com, and views of editors, such as
    app://obsidian.md. Others may not."""
    device: Device = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    weights: Weights = "auto"
    """Format of the weights, as in sample.py."""

    def __post_init__(self) -> None:
        check(self)
        if not self.is_local and not self.api_key:
            raise UsageError(
                f"host is {quoted(self.host)}, which other machines can reach, and needs an API "
                "key: set GPT_API_KEY in the environment"
            )
        if self.api_key and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UsageError("api_key must have only printable ASCII characters, and no spaces")
        for origin in self.allow_origin:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise UsageError(
                    f"allow_origin has {quoted(origin)}, and must have origins such as "
                    "https://example.com"
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or self.model.rstrip("/").rpartition("/")[2] or "model"
