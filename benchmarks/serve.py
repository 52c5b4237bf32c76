"""``gpt serve`` beside llama.cpp's model in ``llama_cpp.server``: the same file, the same requests.

``python benchmarks/serve.py --model FILE.gguf [--runs 3] [--clients 1,4,16]``. Each
server is a process of its own with the same number of threads; one runs at a time, in turns, and
figures are medians. Clients are threads that stream greedy completions of 64 tokens over the
loopback. The peer needs llama-cpp-python with its extra ``server``; ``--peer_path`` puts folders
with it on its path. It answers one request at a time, and another waits: llama.cpp's own program
``llama-server`` is measured instead with ``--llama_server PROGRAM``. The rows:

clients: tokens/s that all clients get together, prompts included (64 tokens each). first: seconds
to the first token of a new prompt of 512 tokens, with one client. turn: the same for the second
turn of that conversation, which has 64 more tokens, and how many tokens of it were read.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch
from machine import describe
from rich.console import Console
from rich.table import Table

from gpt.interop.load import load
from gpt.interop.named import named_file

TOKENS, PROMPT, LONG, MORE, CONTEXT, ROWS, PAGES = 64, 64, 512, 64, 1024, 16, 5
REACH = {1: ">= 1.0 x", 4: ">= 1.2 x", 16: ">= 1.5 x"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def command(which: str, file: Path, port: int, threads: int, program: str) -> list[str]:
    if which == "gpt":
        words = ["-m", "gpt", "serve", str(file), "--port", str(port), "--name", "model"]
        return [sys.executable, *words, "--max_length", str(CONTEXT), "--batch_size", str(ROWS)]
    if program:
        words = ["-m", str(file), "--port", str(port), "-t", str(threads), "-np", str(ROWS)]
        return [program, *words, "-c", str(CONTEXT * ROWS)]
    words = ["-m", "llama_cpp.server", "--model", str(file), "--port", str(port)]
    words += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    # else it runs one request and drops it as soon as another arrives
    words += ["--interrupt_requests", "False", "--cache", "False", "--verbose", "False"]
    return [sys.executable, *words, "--n_ctx", str(CONTEXT), "--model_alias", "model"]


@contextlib.contextmanager
def running(
    which: str, file: Path, threads: int, paths: list[str], program: str
) -> Iterator[httpx.Client]:
    """A client of a running server."""
    port, environment = free_port(), dict(os.environ, OMP_NUM_THREADS=str(threads))
    if which != "gpt":
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryFile() as log:
        words = command(which, file, port, threads, program)
        server = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            # llama.cpp's server closes idle connections
            limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
            with httpx.Client(base_url=address, timeout=600, limits=limits) as client:
                wait_for(client, server, log)
                yield client
        finally:
            server.terminate()
            server.wait()


def wait_for(client: httpx.Client, server: subprocess.Popen[bytes], log: object) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/v1/models").status_code == 200:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    log.seek(0)
    sys.exit(f"the server did not start:\n{log.read().decode()[-2000:]}")


def text_of(tokenizer: object, n: int, seed: int) -> str:
    """A text of about ``n`` tokens: words from a list, no two seeds alike at their beginnings."""
    words = (Path(__file__).parents[1] / "docs" / "techniques.md").read_text("utf-8").split()
    words = [word for word in words if word.isalpha()]
    chosen = " ".join(words[(seed * 37 + i * 7) % len(words)] for i in range(2 * n))
    ids = tokenizer.encode(f"{seed}: {chosen}").tolist()[: n - 1]
    return tokenizer.decode_bytes(ids).decode(errors="ignore")


def ask(client: httpx.Client, prompt: str, n: int) -> tuple[float, int, str, dict[str, int]]:
    """Seconds to the first text, tokens, the text, and the usage of a streamed completion."""
    start, first, pieces, usage = time.perf_counter(), 0.0, [], {}
    body = {"model": "model", "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True}
    body |= {"logit_bias": {"0": -100, "2": -100}}  # no answer ends early
    body |= {"stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if event.get("choices"):
                first = first or time.perf_counter() - start
                pieces.append(event["choices"][0]["text"])
    return first, len(pieces), "".join(pieces), usage


def throughput(client: httpx.Client, prompts: list[str], clients: int) -> float:
    """Tokens/s of all clients together; each asks twice."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        counts = pool.map(lambda prompt: ask(client, prompt, TOKENS), prompts)
        total = sum(usage.get("completion_tokens", n) for _, n, _, usage in counts)
    return total / (time.perf_counter() - start)


def measure(client: httpx.Client, tokenizer: object, clients: list[int], seed: int) -> dict:
    ask(client, text_of(tokenizer, PROMPT, seed), 4)
    found: dict[str, float] = {}
    for n in clients:
        prompts = [text_of(tokenizer, PROMPT, seed + 100 * n + i) for i in range(2 * n)]
        found[f"{n} clients"] = throughput(client, prompts, n)
    prompt = text_of(tokenizer, LONG, seed + 7)
    found["first"], _, text, _ = ask(client, prompt, 16)
    again = prompt + text + " " + text_of(tokenizer, MORE, seed + 8)
    found["turn"], _, _, usage = ask(client, again, 4)
    details = usage.get("prompt_tokens_details") or {}
    if "cached_tokens" in details:
        found["read"] = usage["prompt_tokens"] - details["cached_tokens"]
    return found


def first_paint(address: str) -> float | None:
    """Milliseconds from the request to the first text of the page; None without a browser."""
    driver = shutil.which("chromedriver")
    if driver is None or importlib.util.find_spec("selenium") is None:
        return None
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    query = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    times = []
    for _ in range(PAGES):
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.get(address)
            painted = WebDriverWait(browser, 30, 0.05).until(lambda b: b.execute_script(query))
            times.append(painted)
        finally:
            browser.quit()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2 or a GGUF file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer_path", default=[], action="append", help="a folder of the peer's")
    parser.add_argument("--llama_server", default="", help="llama.cpp's own server program")
    options = parser.parse_args()
    named = options.model == "smollm2"
    file = named_file(options.model, say=print) if named else Path(options.model)
    tokenizer, clients = load(file).tokenizer, [int(n) for n in options.clients.split(",")]
    has_peer = options.llama_server or options.peer_path or importlib.util.find_spec("llama_cpp")
    servers = ["gpt", "llama.cpp"] if has_peer else ["gpt"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    painted = None
    for run in range(options.runs):
        for name in servers:
            peer = (options.peer_path, options.llama_server)
            with running(name, file, options.threads, *peer) as client:
                found[name].append(measure(client, tokenizer, clients, 1000 * run))
                if name == "gpt" and run == 0:
                    painted = first_paint(str(client.base_url))
    table = Table("", *servers, "gpt / llama.cpp", "to reach")
    rows = [(f"{n} clients", f"{n} clients, tokens/s", REACH.get(n, "")) for n in clients]
    rows += [
        ("first", f"first token after {LONG} tokens, s", "<= 1.0 x"),
        ("turn", f"first token of a second turn of {MORE} more, s", ""),
        ("read", "tokens of the second turn that were read", "only new ones"),
    ]
    for key, title, reach in rows:
        medians = [
            statistics.median(each[key] for each in found[name]) if key in found[name][0] else None
            for name in servers
        ]
        shown = ["-" if value is None else f"{value:.3g}" for value in medians]
        ratio = f"{medians[0] / medians[1]:.2f}" if None not in medians and has_peer else ""
        table.add_row(title, *shown, ratio, reach)
    shown = ["-" if painted is None else f"{painted:.0f}", *[""] * (len(servers) - 1)]
    table.add_row("first paint of the page, ms", *shown, "", "<= 300 ms")
    console = Console()
    console.print(describe(), table)


if __name__ == "__main__":
    main()
