"""SmolLM2-135M from its GGUF file (``make smollm2``): this project beside llama.cpp.

``python benchmarks/smollm2.py [--model FILE] [--runs 5] [--rows generation,prompt]``. Both run the
same file with the same number of threads. Each contender is a process of its own, and they run in
turns, so that the machine's drift meets them all; figures are medians. The peer comes with the
extra ``peers``; without it, only this project's figures are shown. The rows:

generation: tokens/s of 128 greedy tokens after a prompt of 64, the prompt's time included. prompt:
tokens/s of reading 512 tokens. batch: tokens/s of 16 conversations at once, 64 + 64 tokens each.
start: seconds from the command to the first token of a prompt, with the file in the page cache.
text: the perplexity of the plays' held-out text in windows of 512 tokens, which both score from the
second token on. memory: the peak above an interpreter with torch (for llama.cpp: above one that has
imported llama_cpp) with a context of 1,024, as a part of the file's size.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from machine import describe
from rich.console import Console
from rich.table import Table

from gpt.config import DataConfig, GenerationConfig
from gpt.data.corpus import open_corpus
from gpt.device import keep_freed_memory
from gpt.generation.decode import decode
from gpt.interop.load import load
from gpt.interop.named import named_file

ROWS = {
    "generation": ("64 + 128 tokens, tokens/s", ">= 1.0 x"),
    "prompt": ("prompt of 512 tokens, tokens/s", ">= 1.0 x"),
    "batch": ("16 conversations, tokens/s", ">= 1.5 x"),
    "start": ("command to first token, s", "<= 1.5 x and 2 s"),
    "text": ("perplexity of the plays", "equal to 0.5 %"),
    "memory": ("peak memory, of the file", "<= 1.2 x"),
}
"""Each row's title, and what it is to reach."""
COUNTS = {"generation": 128, "prompt": 512, "batch": 16 * 64}
"""The tokens whose rate is shown."""
CONTEXT, ROWS_AT_ONCE, WINDOW, WINDOWS = 1024, 16, 512, 16
PROMPT = "First Citizen: Before we proceed any further, hear me speak."
RSS = """
def peak(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
"""
OURS = {
    "start": """
import gpt
loaded = gpt.load({file!r}, weights="auto")
print(next(gpt.stream(loaded, {prompt!r}, max_new_tokens=1, temperature=0)), flush=True)
""",
    "memory": """
import torch
{rss}
before = peak("VmRSS:")
import gpt
loaded = gpt.load({file!r}, weights="auto")
gpt.generate(loaded, "the " * {words}, max_new_tokens=24, temperature=0)
print(peak("VmHWM:") - before)
""",
}
THEIRS = {
    "start": """
import llama_cpp
model = llama_cpp.Llama({file!r}, n_ctx={context}, n_threads={threads}, verbose=False)
model.eval(model.tokenize({prompt!r}.encode()))
print(model.detokenize([model.sample(temp=0.0)]), flush=True)
""",
    "memory": """
import llama_cpp
{rss}
before = peak("VmRSS:")
model = llama_cpp.Llama({file!r}, n_ctx={context}, n_threads={threads}, verbose=False)
model.eval(model.tokenize(b"the " * {words})[:1000])
for _ in range(24):
    model.eval([model.sample(temp=0.0)])
print(peak("VmHWM:") - before)
""",
}


def prompt_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(100, 49_000, n).tolist()


def held_out(tokenizer) -> list[list[int]]:
    """Windows of the plays' held-out text."""
    source = open_corpus(DataConfig(source="shakespeare").source)
    plays = ["".join(document) for document in source.documents()]
    ids = tokenizer.encode(plays[-1])[: WINDOW * WINDOWS]
    return [ids[i : i + WINDOW].tolist() for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def ours(file: Path) -> dict[str, Callable[[], object]]:
    keep_freed_memory()
    model, tokenizer = load(file, weights="auto")

    def generate(prompts: list[list[int]], n: int) -> None:
        list(decode(model, prompts, GenerationConfig(temperature=0, max_new_tokens=n)))

    def perplexity() -> float:
        losses = []
        for window in held_out(tokenizer):
            tokens = torch.tensor([window])
            with torch.inference_mode():
                logits = model(tokens)[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
        return math.exp(statistics.mean(losses))

    return {
        "generation": lambda: generate([prompt_of(64)], 128),
        "prompt": lambda: generate([prompt_of(512)], 1),
        "batch": lambda: generate([prompt_of(64, seed) for seed in range(ROWS_AT_ONCE)], 64),
        "text": perplexity,
    }


def theirs(file: Path) -> dict[str, Callable[[], object]]:
    from llama_cpp import Llama

    threads = torch.get_num_threads()

    def made(**more: object) -> "Llama":
        usual = {"n_ctx": CONTEXT, "n_threads": threads, "n_threads_batch": threads}
        return Llama(str(file), verbose=False, **usual, **more)

    model, tokenizer = made(), load(file).tokenizer
    batch = _Batch(model)

    def generate(prompt: list[int], n: int) -> None:
        model.reset()
        model.eval(prompt)
        for _ in range(n - 1):
            model.eval([model.sample(temp=0.0)])
        model.sample(temp=0.0)

    def perplexity() -> float:
        scoring, losses = made(logits_all=True), []
        for window in held_out(tokenizer):
            scoring.reset()
            scoring.eval(window)
            logits = torch.from_numpy(np.array(scoring.scores[: len(window) - 1]))
            target = torch.tensor(window[1:])
            losses.append(torch.nn.functional.cross_entropy(logits, target).item())
        return math.exp(statistics.mean(losses))

    return {
        "generation": lambda: generate(prompt_of(64), 128),
        "prompt": lambda: generate(prompt_of(512), 1),
        "batch": lambda: batch.generate([prompt_of(64, s) for s in range(ROWS_AT_ONCE)], 64),
        "text": perplexity,
    }


class _Batch:
    """llama.cpp's own decoding of many sequences in one batch."""

    def __init__(self, model) -> None:
        import llama_cpp

        self.api = llama_cpp
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = ROWS_AT_ONCE * 256
        settings.n_batch = settings.n_ubatch = ROWS_AT_ONCE * 64
        settings.n_seq_max = ROWS_AT_ONCE
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(model._model.model, settings)
        vocabulary = llama_cpp.llama_model_get_vocab(model._model.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(ROWS_AT_ONCE * 64, 0, ROWS_AT_ONCE)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Add tokens: each an id, its position, its sequence, and whether its logits are needed."""
        self.batch.n_tokens = len(tokens)
        for i, (token, at, sequence, last) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, at
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = last
        status = self.api.llama_decode(self.context, self.batch)
        assert status == 0, f"llama_decode gave {status}"

    def generate(self, prompts: list[list[int]], n: int) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        length = len(prompts[0])
        tokens = [
            (token, at, row, at == length - 1)
            for row, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        self.decode(tokens)
        at_logits = [length * (row + 1) - 1 for row in range(len(prompts))]
        for step in range(n):
            chosen = []
            for i in at_logits:
                found = self.api.llama_get_logits_ith(self.context, i)
                chosen.append(int(np.ctypeslib.as_array(found, (self.n_vocab,)).argmax()))
            if step < n - 1:
                self.decode([(t, length + step, row, True) for row, t in enumerate(chosen)])
            at_logits = list(range(len(prompts)))


RUNNERS = {"ours": ours, "llama.cpp": theirs}


class Contender:
    """A process that runs what it is told to, and says how long it took and what it gave."""

    def __init__(self, who: str, file: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--contender", who, "--model", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, row: str) -> tuple[float, float]:
        self.process.stdin.write(f"{row}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                taken, gave = json.loads(line[1:])
                return taken, gave
        raise SystemExit(f"{self.process.args} ended without a word")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def contend(who: str, file: Path) -> None:
    jobs = RUNNERS[who](file)
    for line in sys.stdin:
        start = time.perf_counter()
        gave = jobs[line.strip()]()
        print("@" + json.dumps([time.perf_counter() - start, gave]), flush=True)


def program(programs: dict[str, str], row: str, file: Path) -> tuple[float, str]:
    """Seconds and output of a process of its own."""
    threads = torch.get_num_threads()
    code = programs[row].format(
        file=str(file), prompt=PROMPT, context=CONTEXT, words=990, rss=RSS, threads=threads
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - start, done.stdout


def measured(row: str, who: list[str], file: Path, runs: int) -> Iterator[tuple[str, float]]:
    """The figure of each contender."""
    found: dict[str, list[float]] = {name: [] for name in who}
    if row in ("start", "memory"):
        for _ in range(runs):
            for name in who:
                taken, said = program(OURS if name == "ours" else THEIRS, row, file)
                size = file.stat().st_size
                found[name].append(taken if row == "start" else int(said.split()[-1]) / size)
    else:
        running = {name: Contender(name, file) for name in who}
        for contender in running.values():
            contender.run(row)
        for _ in range(1 if row == "text" else runs):
            for name, contender in running.items():
                taken, gave = contender.run(row)
                found[name].append(gave if row == "text" else COUNTS[row] / taken)
        for contender in running.values():
            contender.end()
    for name, figures in found.items():
        yield name, statistics.median(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="the file; by default the installed wheel's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS))
    arguments = parser.parse_args()
    file = arguments.model or named_file("smollm2", say=lambda text: None)
    if arguments.contender:
        contend(arguments.contender, file)
        return
    console = Console(width=max(110, Console().width))
    who = ["ours"]
    if importlib.util.find_spec("llama_cpp") is None:
        console.print("llama.cpp is not installed (pip install '.[peers]'), and left out")
    else:
        who.append("llama.cpp")
    table = Table("", "this project", title=f"{file.name}, {file.stat().st_size / 1e6:.0f} MB")
    for heading in (*who[1:], "ratio", "to reach"):
        table.add_column(heading, justify="right")
    file.read_bytes()  # into the page cache
    for row in arguments.rows.split(","):
        figures = dict(measured(row, who, file, arguments.runs))
        own = figures["ours"]
        shown = [f"{figure:.2f}" if figure < 50 else f"{figure:.0f}" for figure in figures.values()]
        ratio = f"{own / figures['llama.cpp']:.3f} x" if len(who) > 1 else ""
        title, wanted = ROWS[row]
        table.add_row(title, *shown, ratio, wanted)
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
