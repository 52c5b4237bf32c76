"""What the server counts, in the text format that Prometheus reads."""

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
REQUEST = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that the prefix cache had",
    "generated_tokens": "Tokens that were generated",
    "steps": "Steps of the batch",
    "failures": "Steps that failed",
}


class Histogram:
    """How many values, in seconds, are not above each of some bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.total = 0.0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self.counts[next(i for i, bound in enumerate(self.bounds) if value <= bound)] += 1
            self.total += value

    def lines(self, name: str, meaning: str) -> list[str]:
        """The metric in Prometheus' text format."""
        lines, sum_so_far = [f"# HELP {name} {meaning}", f"# TYPE {name} histogram"], 0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            sum_so_far += count
            le = "+Inf" if bound == math.inf else f"{bound:g}"
            lines.append(f'{name}_bucket{{le="{le}"}} {sum_so_far}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {sum_so_far}"]


@dataclass
class Metrics:
    """Counts since the start. Each number has one thread that changes it."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    failures: int = 0
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))
    request: Histogram = field(default_factory=lambda: Histogram(REQUEST))

    def seconds_per_request(self, waiting: int, at_once: int) -> int:
        """About how long it takes until ``waiting`` requests have gone, in whole seconds."""
        done = sum(self.request.counts)
        mean = self.request.total / done if done else 1.0
        return max(1, min(60, math.ceil(mean * max(1, waiting) / at_once)))

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All counts, and ``gauges``: names with their meanings and values."""
        lines = []
        for name, meaning in COUNTERS.items():
            lines += [f"# HELP gpt_{name}_total {meaning}", f"# TYPE gpt_{name}_total counter"]
            lines.append(f"gpt_{name}_total {getattr(self, name)}")
        lines += ["# HELP gpt_requests_total Requests", "# TYPE gpt_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'gpt_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, (meaning, value) in gauges.items():
            lines += [f"# HELP gpt_{name} {meaning}", f"# TYPE gpt_{name} gauge"]
            lines.append(f"gpt_{name} {value:g}")
        lines += self.first_token.lines(
            "gpt_time_to_first_token_seconds", "From a request to its first token"
        )
        lines += self.request.lines("gpt_request_seconds", "From a request to its end")
        return "\n".join(lines) + "\n"
