"""``gpt serve``: a model behind OpenAI's HTTP interface."""

import contextlib
import os
import shlex
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt.config import CacheFormat, ServeConfig, UsageError, foreign, parse
from gpt.console import tell

if TYPE_CHECKING:
    from gpt.model.gpt import GPT


def serve(words: Sequence[str], prog: str) -> int:
    """Answer requests over HTTP, with OpenAI's interface."""
    if not any(word.split("=")[0] == "--api_key" for word in words):
        words = [*words, *_key_from_environment()]
    config = parse(ServeConfig, words, prog=prog)
    try:
        import starlette  # noqa: F401
        import uvicorn
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

    keep_freed_memory()
    listening = _listen(config.host, config.port)
    with listening:
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
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
        )
        engine.start()
        _greet(config, _address(config, listening), rows, length, model.tokenizer.chat is not None)
        try:
            uvicorn.Server(settings).run(sockets=[listening])
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


def _key_from_environment() -> list[str]:
    key = os.environ.get("GPT_API_KEY", "")
    return [f"--api_key={key}"] if key else []


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound there; ``UsageError`` if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as unless_bound:
            listening = unless_bound.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            unless_bound.pop_all()
    except OSError as error:
        reason = foreign(error.strerror or error)
        raise UsageError(
            f"cannot listen on {foreign(host)} port {port}: {reason}; choose another --host or "
            "--port (0: a free one)"
        ) from None
    return listening


def _address(config: ServeConfig, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(config: ServeConfig, address: str, rows: int, length: int, chats: bool) -> None:
    """Say where the server is, and how to try it."""
    tell(
        f"{config.served_name} at {address}/v1, up to {rows} sequences of {length:,} tokens at "
        "once; try"
    )
    key = " -H 'Authorization: Bearer '$GPT_API_KEY" if config.api_key else ""
    path, body = "completions", '{"prompt": "Once upon a time"}'
    if chats:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    tell(
        f"  curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d "
        f"{shlex.quote(body)}"
    )
