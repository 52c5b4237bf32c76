"""The valid things that cases begin with, each a folder or a file: made once, and copied."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import zstandard
from safetensors.torch import save_file

from gpt import cli
from gpt.config import (
    ModelConfig,
    TrainConfig,
    to_toml,
)
from gpt.data.chat_templates import ChatTemplates
from gpt.data.tokenizer import CharTokenizer, GPT2Tokenizer
from gpt.interop.export import export_huggingface
from gpt.interop.families import FAMILIES
from gpt.interop.gguf.export import export_gguf
from gpt.interop.weights import exported
from gpt.model.gpt import GPT
from tests.tiny import tiny_run

TEXT = "Speak, speak. You are all resolved rather to die than to famish?\n" * 16
PACKED = ("int8", "int4", "float32", "bfloat16")
GGUFS = ("gpt2", "llama", "gemma3")
COMPRESSED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<|turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PROMPTS = ("the", "Speak, ", "", "You are all ", "a" * 40)


def train_config(run: str, tokenizer: str) -> TrainConfig:
    """A run of four steps with two checkpoints, which takes a fraction of a second. Its paths are
    relative: a case that trains has its own folder as the current one.
    """
    config = tiny_run(
        Path(),
        "book.txt",
        data={"tokenizer": tokenizer},
        training={"max_steps": 4, "batch_tokens": 64, "micro_batch_size": 2},
        evaluation={"every": 2, "windows": 4, "sample_tokens": 4},
        checkpoint={"keep": 9},
    )
    return dataclasses.replace(config, run_dir=run)


def make(folder: Path) -> None:
    """Fill ``folder``."""
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    os.chdir(folder)
    for name, tokenizer in (("run", "char"), ("other", "byte"), ("new", "byte")):
        config = train_config(name, tokenizer)
        (folder / "start.toml").write_text(to_toml(config), encoding="utf-8")
        gpt("train", folder / "start.toml")
    words = ("--data.tokenizer", "byte", "--shard_tokens", 300)
    gpt("prepare", folder / "book.txt", "--out", folder / "corpus", *words)
    (folder / "ids").mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(400, dtype="<u2").tofile(folder / "ids" / name)
    for kind in PACKED:
        gpt(
            "export", folder / "run", folder / f"packed-{kind}", "--to", "packed", "--weights", kind
        )
    gpt("export", folder / "other", folder / "foreign-bytes")
    make_foreign(folder)
    make_gguf(folder)
    make_lines(folder)
    make_texts(folder)


def parquet(columns: dict[str, list[object]]) -> bytes:
    """The columns as a file."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def make_texts(folder: Path) -> None:
    """Records with texts, in files of several kinds."""
    texts = [f"{i} {line}" for i, line in enumerate(TEXT.splitlines() * 8)]
    (folder / "text.parquet").write_bytes(parquet({"text": texts, "id": list(range(len(texts)))}))
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    (folder / "text.jsonl").write_text(lines)
    for ending, compress in COMPRESSED.items():
        (folder / f"text.jsonl{ending}").write_bytes(compress(lines.encode()))


def gpt(*words: object) -> None:
    """A command that has to do well."""
    assert cli.main([str(word) for word in words]) == 0, words


def make_foreign(folder: Path) -> None:
    """A random GPT-2 with a small vocabulary: whole, in shards, as pickles, with other files for
    its tokenizer.
    """
    torch.manual_seed(0)
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the"]
    model = GPT(ModelConfig(vocab_size=261, context_length=16, n_layer=1, n_head=2, n_embd=32))
    export_huggingface(model, GPT2Tokenizer(ranks), folder / "foreign")
    state = {name: tensor.clone() for name, tensor in exported(model, FAMILIES["gpt2"])}
    names = sorted(state)
    for kind, suffix, write in (
        ("sharded", "safetensors", save_file),
        ("pickles", "bin", torch.save),
    ):
        out = folder / f"foreign-{kind}"
        shutil.copytree(folder / "foreign", out)
        (out / "model.safetensors").unlink()
        stem, places = "model" if suffix == "safetensors" else "pytorch_model", {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-{i:05d}-of-00002.{suffix}"
            write({name: state[name] for name in part}, out / file)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (out / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "foreign", folder / "foreign-pickle")
    (folder / "foreign-pickle" / "model.safetensors").unlink()
    torch.save(state, folder / "foreign-pickle" / "pytorch_model.bin")
    shutil.copytree(folder / "foreign", out := folder / "foreign-vocab")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").unlink()
    vocab = tokenizer["model"]["vocab"] | {"<|endoftext|>": 260}
    (out / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def make_gguf(folder: Path) -> None:
    """A random model in a file for llama.cpp, of three architectures, formats and vocabularies."""
    torch.manual_seed(0)
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the"]
    special = {"<|endoftext|>": 260, "<|turn|>": 261}
    chat = ChatTemplates({"default": TEMPLATE}, {"eos_token": "<|turn|>"})
    vocabularies = {
        "gpt2": GPT2Tokenizer(ranks),
        "llama": GPT2Tokenizer(ranks, special=special, chat=chat),
        "gemma3": CharTokenizer(sorted({*TEXT, *"".join(PROMPTS)})),
    }
    size = {"vocab_size": 262, "context_length": 64, "n_layer": 1, "n_head": 2, "n_embd": 32}
    llama = {"position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu"}
    llama |= {"bias": False, "n_inner": 64}
    gemma = {"activation": "gelu_tanh", "norm_placement": "sandwich", "qk_norm": True}
    gemma |= {"scale_embeddings": True, "window": 4, "rotary_base_local": 1e4}
    shapes = {"gpt2": {}, "llama": llama, "gemma3": llama | gemma | {"rotary_base": 1e6}}
    weights = {"gpt2": "float32", "llama": "int4", "gemma3": "int8"}
    for name in GGUFS:
        pattern = {"window_pattern": "LLLLLG", "n_layer": 6} if name == "gemma3" else {}
        model = GPT(ModelConfig(**(size | shapes[name] | pattern)))
        out = folder / f"{name}.gguf"
        export_gguf(model, vocabularies[name], out, weights=weights[name])


def make_lines(folder: Path) -> None:
    """Prompts, their completions, and a file for each task."""
    activity = {"activity_label": "S", "ctx_a": "You", "ctx_b": "are", "endings": ["all", "to"]}
    items = {
        "prompts.jsonl": [{"prompt": text} for text in PROMPTS[:4]],
        "lambada.jsonl": [{"text": "You are all resolved"}, {"text": "rather to die"}],
        "hellaswag.jsonl": [activity | {"label": "1"}],
        "choices.jsonl": [{"context": "You are", "choices": ["all", "die"], "answer": 0}] * 2,
    }
    for name, lines in items.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--prompt_file", folder / "prompts.jsonl", "--out", folder / "out.jsonl")
    gpt("sample", "--model", folder / "run", *words, "--max_new_tokens", "3", "--seed", "0")
    gpt("evaluate", folder / "run", "--choices", folder / "choices.jsonl")
