"""``python -m tests.soak.load [--seconds 600] [--clients 200]``: a server under load.

Clients ask for completions and answers, streamed or not; a third of them leave midway, and some
send malformed, huge or half requests. Exits with 1 if a text is wrong, an answer has a status that
it must not have, a sequence is left running, or the memory grows. Prints latencies and throughput.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import gpt
from gpt.interop.export import export_huggingface
from tests.generation.test_chat import HELLO, model_of

ALLOWED = {200, 400, 413, 429}
TEXTS = ["Once upon a time", "To be", "It was a dark and stormy night", "A", "Hello there, " * 4]
N_SEEDS = 6
STATUS = Path("/proc")


class Case(NamedTuple):
    """A request without its ``stream``, and the texts that it must get."""

    path: str
    body: dict[str, Any]
    texts: list[str]


def cases_of(model: Any) -> list[Case]:
    """Completions and conversations, by the functions that the server must agree with."""
    cases = []
    for prompt, seed, n in itertools.product(TEXTS, range(N_SEEDS), (8, 60)):
        for more in ({}, {"stop": ["e", "th"]}, {"n": 2}):
            options: dict[str, Any] = {"num_samples": more.get("n", 1)}
            options |= {"stop": tuple(more["stop"])} if "stop" in more else {}
            options |= {"temperature": 1.0, "past_context": "stop", "max_new_tokens": n}
            texts = [each.text for each in gpt.generate(model, prompt, seed=seed, **options)]
            body = {"prompt": prompt, "seed": seed, "max_tokens": n, **more}
            cases.append(Case("/v1/completions", body, texts))
    for seed, n in itertools.product(range(N_SEEDS), (8, 60)):
        text = gpt.chat(model, HELLO, seed=seed, temperature=1.0, max_new_tokens=n)
        body = {"messages": HELLO, "seed": seed, "max_tokens": n, "logprobs": True}
        cases.append(Case("/v1/chat/completions", body, [text]))
    return cases


class Load:
    """The clients' work, and what they saw."""

    def __init__(self, address: str, cases: list[Case], end: float) -> None:
        self.address, self.cases, self.end = address, cases, end
        self.statuses: collections.Counter[int] = collections.Counter()
        self.first: list[float] = []
        self.whole: list[float] = []
        self.problems: list[str] = []
        self.tokens = 0
        self.left = 0

    def client(self, number: int) -> None:
        """One client, until the end."""
        draw = random.Random(number)
        kinds = [self.stays, self.stays, self.leaves, self.stays, self.leaves, self.malformed]
        with httpx.Client(base_url=self.address, timeout=300) as http:
            while time.monotonic() < self.end:
                try:
                    kinds[(number + draw.randrange(2)) % len(kinds)](http, draw)
                except Exception as error:
                    self.problems.append(f"{type(error).__name__}: {error}")

    def stays(self, http: httpx.Client, draw: random.Random) -> None:
        """Ask, and compare the texts."""
        case, start = draw.choice(self.cases), time.monotonic()
        if draw.random() < 0.5:
            answer = http.post(case.path, json=case.body)
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.compare(case, answer.json()["choices"], answer.json()["usage"])
                self.whole.append(time.monotonic() - start)
            else:
                self.wait(answer, draw)
            return
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with http.stream("POST", case.path, json=case.body | options) as answer:
            self.statuses[answer.status_code] += 1
            if answer.status_code != 200:
                self.wait(answer, draw)
                return
            choices, usage, has_begun = [], {}, False
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                choices += event["choices"]
                if not has_begun and any(map(_text, event["choices"])):
                    has_begun = True
                    self.first.append(time.monotonic() - start)
            self.compare(case, choices, usage)
            self.whole.append(time.monotonic() - start)

    def wait(self, answer: httpx.Response, draw: random.Random) -> None:
        """As a client does that is told to come back later."""
        if answer.status_code != 429:
            self.problems.append(f"status {answer.status_code}")
        elif "Retry-After" not in answer.headers:
            self.problems.append("429 without Retry-After")
        time.sleep(draw.random())

    def compare(self, case: Case, choices: list[dict[str, Any]], usage: dict[str, int]) -> None:
        texts = [""] * len(case.texts)
        for choice in choices:
            texts[choice["index"]] += _text(choice)
        self.tokens += usage["completion_tokens"]
        if texts != case.texts:
            self.problems.append(f"{case.body}: {texts!r} is not {case.texts!r}")

    def leaves(self, http: httpx.Client, draw: random.Random) -> None:
        """Ask for much, and close the connection before the answer is whole."""
        host, port = self.address.removeprefix("http://").split(":")
        stream = draw.random() < 0.5
        body = json.dumps({"prompt": "A", "max_tokens": 200, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            if draw.random() < 0.2:
                body = body[: len(body) // 2]
            connection.sendall(head.encode() + body)
            time.sleep(draw.random() * 0.2)
        self.left += 1

    def malformed(self, http: httpx.Client, draw: random.Random) -> None:
        """Ask for what cannot be."""
        bodies = [
            b"{", b"\xff\xfe", b"[" * 50_000, b'{"prompt": 1}', b'{"n": 1e99}', b"null",
            b'{"prompt": "' + b"a" * 5_000_000 + b'"}', json.dumps({"messages": HELLO}).encode(),
            json.dumps({"prompt": "a" * 5000}).encode(), bytes(draw.randbytes(100)),
        ]  # fmt: skip
        kind = {"Content-Type": "application/json"}
        with contextlib.suppress(httpx.TransportError):  # a huge body may be cut off
            answer = http.post("/v1/completions", content=draw.choice(bodies), headers=kind)
            self.statuses[answer.status_code] += 1
            if answer.status_code not in ALLOWED - {200}:
                self.problems.append(f"status {answer.status_code} for a malformed request")
        time.sleep(draw.random() * 0.2)


def _text(choice: dict[str, Any]) -> str:
    """The text in a choice of any kind of answer."""
    said = choice.get("message") or choice.get("delta") or choice
    return said.get("text") or said.get("content") or ""


def memory(process: int) -> int:
    """Bytes that a process has in memory."""
    text = (STATUS / str(process) / "status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024


def gauges(address: str) -> dict[str, float]:
    """The server's numbers."""
    lines = httpx.get(f"{address}/metrics").raise_for_status().text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}


def run(seconds: float, clients: int) -> int:
    """Load a server, and return the number of problems, which are printed."""
    model = model_of(context=256)
    cases = cases_of(model)
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(*model, Path(folder) / "tiny")
        words = [sys.executable, "-m", "gpt", "serve", str(Path(folder) / "tiny"), "--port", "0"]
        words += ["--device", "cpu", "--weights", "float32", "--queue", "64", "--prefix_cache", "8"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            address = re.search(r"http://[\d.:]+", server.stderr.readline())[0]
            return _run(Load(address, cases, time.monotonic() + seconds), server, clients)
        finally:
            server.kill()
            server.wait()
            server.stderr.close()


def _run(load: Load, server: "subprocess.Popen[str]", clients: int) -> int:
    seconds = load.end - time.monotonic()
    threads = [threading.Thread(target=load.client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    sizes = []
    while time.monotonic() < load.end:
        time.sleep(min(5.0, seconds / 20))
        sizes.append(memory(server.pid))
        gauges(load.address)
    for thread in threads:
        thread.join()
    end = time.monotonic() + 10
    while (numbers := gauges(load.address))["gpt_running_sequences"] and time.monotonic() < end:
        time.sleep(0.1)
    for name in ("gpt_running_sequences", "gpt_waiting_sequences", "gpt_failures_total"):
        if numbers[name]:
            load.problems.append(f"{name} is {numbers[name]:g} at the end")
    half = len(sizes) // 2
    grown = statistics.median(sizes[-half // 2 :]) - statistics.median(sizes[half : half + 2])
    if grown > 0.1 * sizes[half]:
        load.problems.append(f"the memory grew by {grown / 1e6:.1f} MB in the second half")
    server.send_signal(signal.SIGTERM)
    server.wait(30)
    shown = dict(sorted(load.statuses.items()))
    print(f"{clients} clients, {seconds:.0f} s: statuses {shown}, {load.left} clients left midway")
    print(
        f"{load.tokens / seconds:,.0f} compared tokens/s; memory {sizes[-1] / 1e6:.0f} MB", end=""
    )
    print(f", {grown / 1e6:+.1f} MB in the second half")
    for name, values in (("first token", load.first), ("whole answer", load.whole)):
        if values:
            parts = statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
            print(
                f"{name}: median {parts[49]:.2f} s, 95 % {parts[94]:.2f} s, 99 % {parts[98]:.2f} s"
            )
    for problem in load.problems[:20]:
        print(f"  {problem[:300]}")
    print(f"{len(load.problems)} problems", flush=True)
    return len(load.problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    return int(run(options.seconds, options.clients) > 0)


if __name__ == "__main__":
    sys.exit(main())
