"""Prometheus metrics, all prefixed `memdec_` (vLLM unregisters every collector that begins with `vllm:`).

Labels hold configured domain names only, never a client's string.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Histogram

BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
LABELS = ("mode", "domain")
NONE = "none"

TIME_TO_FIRST_TOKEN = Histogram("memdec_time_to_first_token_seconds", "Arrival to first token.", LABELS, buckets=BUCKETS)
INTER_TOKEN_LATENCY = Histogram(
    "memdec_inter_token_latency_seconds", "Time between a request's consecutive engine outputs.", LABELS, buckets=BUCKETS
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "memdec_time_per_output_token_seconds", "A request's mean time per token after the first.", LABELS, buckets=BUCKETS
)
GENERATED_TOKENS = Counter("memdec_generated_tokens", "Tokens generated.", LABELS)
REQUESTS = Counter("memdec_requests", "Requests answered, by HTTP status.", (*LABELS, "status"))


class Timings:
    """Per-token observations by domain; label lookups are done once, not per token."""

    def __init__(self, domains: Iterable[str]) -> None:
        labels = {None: (NONE, NONE)} | {name: ("decoder", name) for name in domains}
        self.first = {name: TIME_TO_FIRST_TOKEN.labels(*pair) for name, pair in labels.items()}
        self.next = {name: INTER_TOKEN_LATENCY.labels(*pair) for name, pair in labels.items()}
        self.mean = {name: TIME_PER_OUTPUT_TOKEN.labels(*pair) for name, pair in labels.items()}
        self.count = {name: GENERATED_TOKENS.labels(*pair) for name, pair in labels.items()}

    def tokens(self, choice: Any, count: int, seconds: float, first: bool) -> None:
        """Count `count` new tokens that came `seconds` after the arrival (first) or after the previous ones."""
        name = _name(choice)
        (self.first if first else self.next)[name].observe(seconds)
        self.count[name].inc(count)

    def finished(self, choice: Any, seconds: float) -> None:
        """A request of at least two tokens ended; `seconds` is its mean time per token after the first."""
        self.mean[_name(choice)].observe(seconds)


def _name(choice: Any) -> str | None:
    return choice.domain if choice is not None else None
