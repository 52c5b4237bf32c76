"""LoRA beside PEFT's: ``python benchmarks/lora.py [--model smollm2]``.

The same steps of AdamW on the same tokens, rank 8 on all linear layers of the attention, float32
weights: this project, this project over the blocks of a GGUF file, and ``transformers`` with PEFT.
All multiply in the dtype that is fast on the machine, by autocast; ``--precision`` chooses another
one. Each contender is a process of its own; the peak memory is that of its whole life. Figures are
medians of the steps after the first.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import show
from rich.table import Table
from torch import Tensor

from gpt.config import AdapterConfig
from gpt.device import choose_precision
from gpt.interop.export import export_huggingface
from gpt.interop.load import load, load_for_adapter
from gpt.model.adapter import adapt
from gpt.model.gpt import GPT
from gpt.training.loss import loss_of_features
from gpt.training.precision import autocast

CPU = torch.device("cpu")
Step = Callable[[Tensor, Tensor], Tensor]
"""The summed loss of the targets ``[B, T]`` after the tokens ``[B, T]``."""


def ours(options: argparse.Namespace) -> tuple[Step, list[Tensor]]:
    """A model of this project, with an adapter."""
    return adapted(load(options.model, trainable=True).model, options)


def over_blocks(options: argparse.Namespace) -> tuple[Step, list[Tensor]]:
    """The same over the blocks of the file."""
    return adapted(load_for_adapter(options.model).model, options)


def adapted(model: GPT, options: argparse.Namespace) -> tuple[Step, list[Tensor]]:
    """A step of the model with an adapter, and the adapter's parameters."""
    adapt(model.train(), AdapterConfig(kind="lora", rank=options.rank))

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(tokens, read=functools.partial(loss_of_features, targets=targets))

    return step, [p for p in model.parameters() if p.requires_grad]


def theirs(options: argparse.Namespace) -> tuple[Step, list[Tensor]]:
    """The library PEFT over ``transformers``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(plain, LoraConfig(r=options.rank, lora_alpha=16, target_modules=targets))
    model.train()

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return step, [p for p in model.parameters() if p.requires_grad]


CONTENDERS = {"this project": ours, "over blocks": over_blocks, "PEFT": theirs}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train one contender; its tokens a second, peak memory in MB and last loss."""
    torch.manual_seed(0)
    step, parameters = CONTENDERS[options.only](options)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    seconds, loss = [], 0.0
    generator = torch.Generator().manual_seed(1)
    for _ in range(options.steps + 1):
        ids = torch.randint(1000, (options.rows, options.length + 1), generator=generator)
        start = time.perf_counter()
        with autocast(CPU, choose_precision(options.precision, CPU)):
            total = step(ids[:, :-1], ids[:, 1:]) / (options.rows * options.length)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(total.detach())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    speed = options.rows * options.length / statistics.median(seconds[1:])
    return {"speed": speed, "peak": peak, "loss": loss}


def main() -> None:
    """Measure every contender, and show a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--folder", default="")
    parser.add_argument("--only", choices=CONTENDERS)
    options = parser.parse_args()
    if options.only:
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(options.model, trainable=True)
        export_huggingface(loaded.model, loaded.tokenizer, Path(folder) / "model")
        del loaded
        table = Table("", "tokens/s", "peak memory, MB", "loss")
        for name in CONTENDERS:
            words = [*sys.argv, "--only", name, "--folder", f"{folder}/model"]
            done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            figures = found["speed"], found["peak"], found["loss"]
            table.add_row(name, *(f"{n:,.{d}f}" for n, d in zip(figures, (0, 0, 3), strict=True)))
        show(table)


if __name__ == "__main__":
    main()
