"""Training speed beside nanoGPT and Hugging Face, in one run: the 10.7M-parameter character model
(6 layers, 6 heads, 384 wide, T=256, dropout 0.2), and GPT-2 124M (T=1024, no dropout).

``python benchmarks/train.py [--model 10m|124m] [--sequences N] [--nanogpt PATH/model.py]``. A step
is forward, backward, clipping and optimizer of N sequences (64, and 1 for 124m). Each line is a
process of its own, and they run in turns; a figure is the median over all turns. The rate of the
products is that of large square matrices in the row's dtype, measured at the end. nanoGPT's model
file is used as it is, eager with fused AdamW and micro batches of at most 16, as is Hugging Face's
GPT-2: in float32, and under autocast where the processor multiplies bfloat16 fast. The defaults
that matter on a CPU are also turned off one by one.
"""

import argparse
import importlib.util
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe, seconds
from rich.console import Console
from rich.table import Table

from gpt import training_kernels
from gpt.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, TrainingConfig
from gpt.data.prepare import prepare
from gpt.device import choose_precision, keep_freed_memory
from gpt.model.gpt import GPT
from gpt.speed import product_flops
from gpt.training.loop import Trainer

SHAPES = {
    "10m": {"vocab_size": 72, "context_length": 256, "n_layer": 6, "n_head": 6, "n_embd": 384},
    "124m": {"vocab_size": 50304, "context_length": 1024},
}
SEQUENCES = {"10m": 64, "124m": 1}
VARIANTS = {
    "defaults": "this project, defaults on a CPU",
    "float32": "... in float32",
    "freed memory": "... without keeping freed memory",
    "operators": "... with torch's operators between the products",
    "one block": "... with attention in one block of queries",
    "single weights": "... with an update of AdamW for each parameter",
    "nanogpt": "nanoGPT, eager float32",
    "nanogpt bfloat16": "nanoGPT, eager bfloat16",
    "hugging face": "Hugging Face GPT-2, eager float32",
    "hugging face bfloat16": "Hugging Face GPT-2, eager bfloat16",
}
PEERS = [name for name, line in VARIANTS.items() if "eager" in line]
ABLATIONS = {
    "10m": ["float32", "freed memory", "operators", "single weights"],
    "124m": ["operators", "one block"],
}


def ours(model: ModelConfig, sequences: int, precision: str) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(DataConfig(), Path(folder))
        micro = min(16, sequences)
        config = TrainConfig(
            run_dir=folder,
            model=model,
            training=TrainingConfig(
                batch_tokens=sequences * model.context_length,
                micro_batch_size=micro,
                precision=precision,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        )
        return Trainer(config, data)  # the shards stay mapped after the folder is gone


def theirs(
    model: torch.nn.Module, shape: ModelConfig, sequences: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Steps of a model whose call with tokens and targets gives the loss, under autocast to
    ``dtype``.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    micro = min(16, sequences)
    ids = torch.randint(shape.vocab_size, (sequences // micro, micro, shape.context_length))

    def step() -> None:
        for tokens in ids:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(tokens, tokens) / len(ids)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(shape: ModelConfig) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    names = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        **dict.fromkeys(names, shape.dropout),
    )
    model = GPT2LMHeadModel(config).train()
    forward = model.forward
    model.forward = lambda tokens, targets: forward(tokens, labels=targets).loss
    return model


def nanogpt(path: str, shape: ModelConfig) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=shape.context_length,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        dropout=shape.dropout,
        bias=True,
    )
    model = module.GPT(config).train()
    forward = model.forward
    model.forward = lambda tokens, targets: forward(tokens, targets)[1]
    return model


def measure(variant: str, shape: ModelConfig, sequences: int, steps: int, path: str) -> list[float]:
    """Tokens/s of each step of a variant, in this process, and its peak memory in GB."""
    if variant not in ("freed memory", *PEERS):
        keep_freed_memory()
    if variant == "operators":
        training_kernels.library = lambda: None
    if variant == "one block":
        training_kernels.QUERIES = shape.context_length
    if variant in PEERS:
        model = nanogpt(path, shape) if variant.startswith("nanogpt") else hugging_face(shape)
        dtype = torch.bfloat16 if variant.endswith("bfloat16") else torch.float32
        step = theirs(model, shape, sequences, dtype)
    else:
        trainer = ours(shape, sequences, "float32" if variant == "float32" else "auto")
        if variant == "single weights":
            for group in (group for own in trainer.optimizers for group in own.param_groups):
                group |= {"fused": False, "foreach": False}
        step = trainer.update
    step()
    tokens = sequences * shape.context_length
    rates = [tokens / seconds(step) for _ in range(steps)]
    return [*rates, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9]


def compare(name: str, arguments: argparse.Namespace, chosen: list[str]) -> Table:
    """The table of the ``chosen`` variants of a model."""
    shape, sequences = shape_of(name, arguments.dropout), arguments.sequences or SEQUENCES[name]
    rates: dict[str, list[float]] = {variant: [] for variant in chosen}
    memory: dict[str, float] = {}
    for _ in range(arguments.turns):
        for variant in chosen:
            words = [sys.executable, __file__, "--variant", variant, "--model", name]
            words += ["--steps", str(arguments.steps), "--dropout", str(shape.dropout)]
            words += ["--sequences", str(sequences), "--nanogpt", arguments.nanogpt]
            done = subprocess.run(words, check=False, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{VARIANTS[variant]}: {done.stderr}")
            *figures, peak = map(float, done.stdout.rpartition("@")[2].split())
            rates[variant] += figures
            memory[variant] = max(peak, memory.get(variant, 0))
    peers = [variant for variant in PEERS if variant in chosen]
    tokens = sequences * shape.context_length
    table = Table(title=f"{name}, {tokens:,} tokens a step, dropout {shape.dropout}")
    for heading in (
        "",
        "tokens/s",
        *(f"of {VARIANTS[peer].replace(' eager', '')}" for peer in peers),
    ):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("of the products' rate", justify="right")
    table.add_column("peak GB", justify="right")
    fast = choose_precision("auto", torch.device("cpu"))
    peaks = {dtype: product_flops(dtype) for dtype in {fast, torch.float32}}
    with torch.device("meta"):
        flops = GPT(shape).flops_per_token()
    median = {variant: statistics.median(values) for variant, values in rates.items()}
    for variant in chosen:
        ratios = [f"{median[variant] / median[peer]:.2f} x" for peer in peers]
        dtype = torch.float32 if "float32" in VARIANTS[variant] else fast
        share = f"{100 * median[variant] * flops / peaks[dtype]:.0f} %"
        figures = (f"{median[variant]:,.0f}", *ratios, share, f"{memory[variant]:.2f}")
        table.add_row(VARIANTS[variant], *figures)
    return table


def shape_of(name: str, dropout: float | None) -> ModelConfig:
    usual = 0.2 if name == "10m" else 0.0
    return ModelConfig(**SHAPES[name], dropout=usual if dropout is None else dropout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, help="without it: both")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--steps", type=int, default=2, help="of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--nanogpt", default="", help="its model.py")
    parser.add_argument("--only", default="", help="these variants, with commas between them")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    if wrong := [name for name in only if name not in VARIANTS]:
        parser.error(f"--only has {', '.join(wrong)}; there are {', '.join(VARIANTS)}")
    if arguments.nanogpt and not Path(arguments.nanogpt).is_file():
        parser.error(f"--nanogpt {arguments.nanogpt} is not a file; it is nanoGPT's model.py")
    if not arguments.nanogpt and any(name.startswith("nanogpt") for name in only):
        parser.error("--only has nanoGPT, whose model.py --nanogpt names")
    if arguments.dropout is not None and not 0 <= arguments.dropout < 1:
        parser.error(f"--dropout is {arguments.dropout}, and must be at least 0 and below 1")
    for name in ("steps", "turns", "sequences"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"--{name} is {number}, and must be at least 1")
    n = arguments.sequences or 1
    if n > 16 and n % 16:
        parser.error(f"--sequences is {n}, and above 16 must be a multiple of 16")
    if arguments.variant:
        shape = shape_of(arguments.model, arguments.dropout)
        print("@", *measure(arguments.variant, shape, n, arguments.steps, arguments.nanogpt))
        return
    console = Console(width=max(160, Console().width))
    console.print(describe(), highlight=False, soft_wrap=True)
    if not arguments.nanogpt:
        console.print("nanoGPT is left out: --nanogpt names its model.py")
    fast = choose_precision("auto", torch.device("cpu"))
    for name in [arguments.model] if arguments.model else SHAPES:
        chosen = only or [
            variant
            for variant, line in VARIANTS.items()
            if (variant == "defaults" or variant in [*ABLATIONS[name], *PEERS])
            and not (line.endswith("bfloat16") and fast != torch.bfloat16)
        ]
        if not only and not arguments.nanogpt:
            chosen = [variant for variant in chosen if not variant.startswith("nanogpt")]
        console.print(compare(name, arguments, chosen))


if __name__ == "__main__":
    main()
