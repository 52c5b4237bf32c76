"""``gpt serve``: a model behind OpenAI's HTTP interface."""

import os
import shlex
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt.config import CacheFormat, ServeConfig, UsageError, foreign, parse
from gpt.console import tell

if TYPE_CHECKING:
    from gpt.model.gpt import GPT


BACKLOG = 2048
"""Connections that wait to be accepted."""


def serve(words: Sequence[str], prog: str) -> int:
    """Answer requests over HTTP, with OpenAI's interface."""
    key = os.environ.get("GPT_API_KEY", "")
    typed = any(word.partition("=")[0].replace("-", "_") == "__api_key" for word in words)
    if key and not typed:
        words = [*words, f"--api_key={key}"]
    config = parse(ServeConfig, words, prog=prog)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"gpt serve needs {foreign(error.name)}, which is not installed: "
            "pip install 'gpt[serve]'"
        ) from None
    from gpt.device import choose_device, keep_freed_memory
    from gpt.generation.text import generate
    from gpt.interop.load import load
    from gpt.server.app import Server
    from gpt.server.engine import Engine, rows_that_fit
    from gpt.server.http import bind, server

    keep_freed_memory()
    with bind(config.host, config.port) as listening:
        device = choose_device(config.device)
        model = load(config.model, device=device, weights=config.weights, say=tell)
        context = model.model.config.context_length
        length = min(config.max_length or context, context)
        if config.cache == "bfloat16":
            store_in_bfloat16(model.model)
        stored_as: CacheFormat = "int8" if config.cache == "int8" else "float"
        rows = rows_that_fit(model.model, config.batch_size, length, stored_as)
        generate(model, max_new_tokens=2, past_context="stop")  # kernels are compiled here
        engine = Engine(
            model,
            batch_size=rows,
            queue=config.queue,
            prefix_bytes=config.prefix_cache << 20,
            cache=stored_as,
            say=tell,
        )
        app = Server(engine, model, config, length).app()
        engine.start()
        listening.listen(BACKLOG)
        _greet(config, _address(config, listening), rows, length, model.tokenizer.chat is not None)
        try:
            server(app, engine).run(sockets=[listening])
        finally:
            engine.stop()
    return 0


def store_in_bfloat16(model: "GPT") -> None:
    """Let the model's caches store bfloat16; ``UsageError`` where the device only emulates it."""
    import torch

    from gpt.device import choose_precision

    if choose_precision("auto", model.device) != torch.bfloat16:
        raise UsageError(
            f"cache is bfloat16, for which {model.device} has no instructions; choose float or int8"
        )
    model.cache_dtype = torch.bfloat16


def _address(config: ServeConfig, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(config: ServeConfig, address: str, rows: int, length: int, chats: bool) -> None:
    """Say where the server is, and how to try it."""
    tell(
        f"{config.served_name} at {address}/v1, up to {rows} sequences of {length:,} tokens at "
        "once; try"
    )
    key = ""
    if config.api_key:
        known = config.api_key == os.environ.get("GPT_API_KEY")
        key = " -H 'Authorization: Bearer '" + ("$GPT_API_KEY" if known else "KEY")
    path, body = "completions", '{"prompt": "Once upon a time"}'
    if chats:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    tell(
        f"  curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d "
        f"{shlex.quote(body)}"
    )
