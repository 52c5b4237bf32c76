"""Decoding GPT-2 124M with random weights, batch 1, greedy, prefill included: every format of the
weights beside its peers, or beside models of other shapes.

``python benchmarks/decode.py [--peers hf,ctranslate2,llama.cpp] [--weights float32,int8]
[--model_shape gpt2,llama,mixtral]``. The shapes read about as many bytes a token. The peers come
with the extra ``peers``; llama.cpp's files are made by its own converter, which lies in its source:
``--llama_cpp SOURCE``. Each contender is a process of its own, and they run in turns, so that the
machine's drift meets them all; figures are medians. The last column of each peer's is this
project's tokens/s over the peer's.
"""

import argparse
import dataclasses
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from machine import bandwidth, describe
from rich.console import Console
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.config import GenerationConfig
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.device import keep_freed_memory
from gpt.generation.decode import decode
from gpt.generation.inference import prepare_for_inference
from gpt.interop.export import export_huggingface
from gpt.interop.load import load

FORMATS = ("float32", "bfloat16", "int8", "int4")
PEERS = {
    "hf": {"float32": "float32", "bfloat16": "bfloat16"},
    "ctranslate2": {"float32": "float32", "int8": "int8"},
    "llama.cpp": {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"},
}
LLAMA = ModelConfig(
    position="rotary", norm="rmsnorm", mlp="gated", activation="silu", bias=False, n_kv_head=4,
    n_inner=2048,
)  # fmt: skip
SHAPES = {
    "gpt2": ModelConfig(),
    "llama": LLAMA,
    "mixtral": dataclasses.replace(
        LLAMA, n_expert=8, n_expert_active=2, moe_renormalise=True, n_inner=1024
    ),
}
MODULES = {"hf": "transformers", "ctranslate2": "ctranslate2", "llama.cpp": "llama_cpp"}


def prompt_of(n: int) -> list[int]:
    return random.Random(0).choices(range(50257), k=n)


def ours(folder: Path, kind: str, prompt: list[int], n: int) -> Callable[[], object]:
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(folder / "hf", weights=kind, device=device).model
    config = GenerationConfig(temperature=0, max_new_tokens=n)
    return lambda: list(decode(model, [prompt], config))


def shaped(folder: Path, kind: str, prompt: list[int], n: int) -> Callable[[], object]:
    keep_freed_memory()
    shape, kind = kind.split()
    torch.manual_seed(0)
    model = prepare_for_inference(GPT(SHAPES[shape]).eval(), kind)
    config = GenerationConfig(temperature=0, max_new_tokens=n)
    return lambda: list(decode(model, [prompt], config))


def hf(folder: Path, kind: str, prompt: list[int], n: int) -> Callable[[], object]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=getattr(torch, kind)).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def ctranslate2(folder: Path, kind: str, prompt: list[int], n: int) -> Callable[[], object]:
    import ctranslate2

    threads = torch.get_num_threads()
    generator = ctranslate2.Generator(
        str(folder / "ct2"), compute_type=kind, inter_threads=1, intra_threads=threads
    )
    vocabulary = json.loads((folder / "ct2" / "vocabulary.json").read_text())
    tokens = [vocabulary[i] for i in prompt]
    options = {"max_length": n, "min_length": n, "sampling_topk": 1}
    return lambda: generator.generate_batch([tokens], include_prompt_in_result=False, **options)


def llama_cpp(folder: Path, kind: str, prompt: list[int], n: int) -> Callable[[], object]:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    context = min(1024, len(prompt) + n + 64)
    model = Llama(
        str(folder / f"{kind}.gguf"),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run() -> None:
        model.reset()
        model.eval(prompt)
        for _ in range(n - 1):
            model.eval([model.sample(temp=0.0)])
        model.sample(temp=0.0)

    return run


RUNNERS = {
    "ours": ours,
    "shaped": shaped,
    "hf": hf,
    "ctranslate2": ctranslate2,
    "llama.cpp": llama_cpp,
}


def make_files(folder: Path, peers: list[str], source: Path | None) -> None:
    """The random model, in each peer's form."""
    torch.manual_seed(0)
    export_huggingface(GPT(ModelConfig()).eval(), GPT2Tokenizer.released(), folder / "hf")
    if "ctranslate2" in peers:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    if "llama.cpp" in peers:
        import llama_cpp

        for kind in ("f32", "bf16", "q8_0"):
            words = [str(folder / "hf"), "--outtype", kind, "--outfile", f"{folder}/{kind}.gguf"]
            converter = str(source / "convert_hf_to_gguf.py")
            done = subprocess.run(
                [sys.executable, converter, *words], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        names = [f"{folder}/{kind}.gguf".encode() for kind in ("f32", "q4_0")]
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_model_quantize(*names, parameters)


class Contender:
    """A process that runs when it is told to, and says how long it took."""

    def __init__(self, folder: Path, who: str, kind: str, prompt: int, new: int) -> None:
        words = ["--contender", json.dumps([str(folder), who, kind, prompt, new])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.times: list[float] = []
        self.said()

    def said(self) -> str:
        for line in self.process.stdout:
            if line.startswith("@"):
                return line[1:]
        raise SystemExit(f"{self.process.args} ended without a word")

    def run(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.times.append(float(self.said()))

    def end(self) -> float:
        self.process.stdin.close()
        self.process.wait()
        return statistics.median(self.times)


def contend(folder: str, who: str, kind: str, prompt: int, new: int) -> None:
    run = RUNNERS[who](Path(folder), kind, prompt_of(prompt), new)
    run()
    print("@ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"@{time.perf_counter() - start}", flush=True)


def weight_bytes(kind: str, config: ModelConfig) -> float:
    """Bytes that a token reads: all matrices, the head's once, and the active experts alone."""
    with torch.device("meta"):
        model = prepare_for_inference(GPT(config), kind, device=torch.device("cpu"))
    names = {id(t): (name, t) for name, t in model.own_tensors().items() if "position" not in name}
    active = config.n_expert_active / max(1, config.n_expert)
    return sum(t.nbytes * (active if ".experts." in name else 1) for name, t in names.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--peers", default="hf")
    parser.add_argument("--weights", default=",".join(FORMATS))
    parser.add_argument("--model_shape", default="gpt2", help="gpt2, llama, mixtral")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--llama_cpp", type=Path, help="the source of llama.cpp")
    arguments = parser.parse_args()
    if arguments.contender:
        contend(*json.loads(arguments.contender))
        return
    console = Console(width=max(110, Console().width))
    peers = [peer for peer in arguments.peers.split(",") if peer]
    for peer in list(peers):
        if importlib.util.find_spec(MODULES[peer]) is None:
            console.print(f"{peer} is not installed (pip install '.[peers]'), and left out")
            peers.remove(peer)
    if "llama.cpp" in peers and arguments.llama_cpp is None:
        console.print("llama.cpp needs --llama_cpp SOURCE, for its converter, and is left out")
        peers.remove("llama.cpp")
    speed = bandwidth()
    title = (
        f"GPT-2 124M, {arguments.prompt_tokens} + {arguments.new_tokens} tokens, greedy; "
        f"this machine streams {speed / 1e9:.0f} GB/s"
    )
    table = Table("weights", "tokens/s", "GB/s", "of the stream", title=title)
    shapes = [shape for shape in arguments.model_shape.split(",") if shape != "gpt2"]
    for peer in [*peers, *shapes]:
        table.add_column(peer, justify="right")
        table.add_column("ratio" if peer in peers else "GB/s", justify="right")
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, peers, arguments.llama_cpp)
        sizes = (arguments.prompt_tokens, arguments.new_tokens)
        for kind in arguments.weights.split(","):
            who = {"ours": kind} | {p: PEERS[p][kind] for p in peers if kind in PEERS[p]}
            running = {name: Contender(folder, name, form, *sizes) for name, form in who.items()}
            for shape in shapes:
                running[shape] = Contender(folder, "shaped", f"{shape} {kind}", *sizes)
            for _ in range(arguments.runs):
                for contender in running.values():
                    contender.run()
            # one new token: what takes the time is the prompt
            tokens = arguments.new_tokens if arguments.new_tokens > 1 else arguments.prompt_tokens
            seconds = {name: contender.end() for name, contender in running.items()}
            rate = {name: tokens / each for name, each in seconds.items()}
            read = arguments.new_tokens / seconds["ours"] * weight_bytes(kind, SHAPES["gpt2"])
            row = [kind, f"{rate['ours']:.1f}", f"{read / 1e9:.1f}", f"{read / speed:.0%}"]
            for peer in peers:
                has = peer in rate
                row += [
                    f"{rate[peer]:.1f}" + (f" ({who[peer]})" if who.get(peer, kind) != kind else "")
                    if has
                    else "",
                    f"{rate['ours'] / rate[peer]:.2f} x" if has else "",
                ]
            for shape in shapes:
                reads = weight_bytes(kind, SHAPES[shape]) * rate[shape]
                row += [f"{rate[shape]:.1f}", f"{reads / 1e9:.1f}"]
            table.add_row(*row)
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
