"""Loading GPT-2's weights from safetensors: time and peak memory beside Hugging Face's.

``python benchmarks/load.py [--sizes gpt2,gpt2-xl] [--dtypes float32,bfloat16]``. The files hold
random weights of the named sizes. Each load is a process of its own that has imported what it
needs; its peak is the operating system's account, above what the imports took. One line at the end
reads the file alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe, seconds
from rich.console import Console
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.interop.export import export_huggingface

SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
SIZES["gpt2-xl"] = (48, 25, 1600)
IMPORTS = {
    "this project": "from gpt.interop.huggingface import load_folder",
    "Hugging Face": "from transformers import GPT2LMHeadModel",
}
LOADS = {
    "this project": "model = load_folder(Path({folder!r}), dtype=torch.{dtype})",
    "Hugging Face": "model = GPT2LMHeadModel.from_pretrained({folder!r}, dtype=torch.{dtype})",
}
PROGRAM = """
import json, time, torch
from pathlib import Path
{imports}
def peak(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
before = peak("VmRSS:")
start = time.perf_counter()
{load}
total = float(sum(p.sum() for p in model.parameters()))  # every page is there
taken = time.perf_counter() - start
print(json.dumps([taken, peak("VmHWM:") - before]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="gpt2,gpt2-xl")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    table = Table(title="loading safetensors of float32, then summing every weight once")
    for heading in ("", "seconds", "peak MB", "of the loaded weights"):
        table.add_column(heading, justify="left" if not heading else "right")
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / size
            layers, heads, width = SIZES[size]
            model = GPT(ModelConfig(n_layer=layers, n_head=heads, n_embd=width))
            count = model.parameter_count()
            export_huggingface(model, GPT2Tokenizer.released(), folder)
            del model
            (folder / "model.safetensors").read_bytes()  # into the file cache
            for dtype in arguments.dtypes.split(","):
                weights = count * getattr(torch, dtype).itemsize
                runs = {who: [] for who in IMPORTS}
                for _ in range(arguments.runs):
                    for who, imports in IMPORTS.items():
                        load = LOADS[who].format(folder=str(folder), dtype=dtype)
                        program = PROGRAM.format(imports=imports, load=load)
                        words = [sys.executable, "-c", program]
                        done = subprocess.run(words, check=True, capture_output=True, text=True)
                        runs[who].append(json.loads(done.stdout))
                for who, measured in runs.items():
                    time, peak = (
                        statistics.median(column) for column in zip(*measured, strict=True)
                    )
                    table.add_row(
                        f"{size}, {dtype}: {who}",
                        f"{time:.2f}",
                        f"{peak / 1e6:,.0f}",
                        f"{peak / weights:.2f} x",
                    )
            reading = seconds(lambda path=folder / "model.safetensors": path.read_bytes())
            table.add_row(f"{size}: reading the file alone", f"{reading:.2f}", "", "")
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
