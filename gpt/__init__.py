"""Train a GPT on your text, and sample from it with a KV cache.

The core takes an evening to read: ``gpt.py``, ``block.py``, ``attention.py``, ``attend.py``,
``cache.py`` and ``store.py`` in ``gpt/model/``, ``gpt/generation/decode.py``,
``gpt/training/loop.py``; 2,300 lines in all.

The names here are the public Python interface. They are imported at their first use, so that
``import gpt`` alone does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.config import ModelConfig
    from gpt.generation.chat import chat
    from gpt.generation.inference import prepare_for_inference
    from gpt.generation.text import generate, stream
    from gpt.interop.load import load
    from gpt.model.cache import KVCache
    from gpt.model.gpt import GPT

__version__ = "0.1.0"
__all__ = [
    "GPT", "KVCache", "ModelConfig", "chat", "generate", "load", "prepare_for_inference", "stream",
]  # fmt: skip

_HOME = {
    "GPT": "gpt.model.gpt",
    "KVCache": "gpt.model.cache",
    "ModelConfig": "gpt.config",
    "chat": "gpt.generation.chat",
    "generate": "gpt.generation.text",
    "load": "gpt.interop.load",
    "prepare_for_inference": "gpt.generation.inference",
    "stream": "gpt.generation.text",
}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
