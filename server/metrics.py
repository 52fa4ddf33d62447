"""Prometheus metrics, all prefixed `memdec_` (vLLM unregisters every collector that begins with `vllm:`).

Labels hold configured domain names only, never a client's string.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from memdec.server.routing.domains import NONE

Label = tuple[str, str]  # mode and domain

BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
LABELS = ("mode", "domain")
NO_LABEL = (NONE, NONE)  # (mode, domain) label of requests without a domain

TIME_TO_FIRST_TOKEN = Histogram("memdec_time_to_first_token_seconds", "Arrival to first token.", LABELS, buckets=BUCKETS)
INTER_TOKEN_LATENCY = Histogram(
    "memdec_inter_token_latency_seconds",
    "Time between a request's consecutive engine outputs, shared by the tokens of each.",
    LABELS,
    buckets=BUCKETS,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "memdec_time_per_output_token_seconds", "A request's mean time per token after the first.", LABELS, buckets=BUCKETS
)
GENERATED_TOKENS = Counter("memdec_generated_tokens", "Tokens generated.", LABELS)
REQUESTS = Counter("memdec_requests", "Requests answered, by HTTP status.", (*LABELS, "status"))
SHADOWS = Counter("memdec_shadows", "Decoder requests replayed in a baseline mode: done, failed or dropped.", (*LABELS, "outcome"))
BUILD = Gauge("memdec_build_info", "Versions, as labels of a constant 1.", ("version", "vllm", "torch", "base"), multiprocess_mode="max")
DOMAIN = Gauge("memdec_domain_info", "Loaded decoders, as labels of a constant 1.", ("domain", "revision"), multiprocess_mode="max")


class StepSeconds(Collector):
    """Where the engine's steps spend their time; `totals` is refreshed from the worker before each scrape."""

    totals: dict[str, tuple[float, int]]

    def __init__(self) -> None:
        self.totals = {}

    def collect(self) -> Iterator[Metric]:
        """Two counters by part."""
        seconds = CounterMetricFamily("memdec_step_seconds", "Seconds of the engine's steps, by part.", labels=["part"])
        calls = CounterMetricFamily("memdec_step_calls", "Times each part of a step ran.", labels=["part"])
        for part, (total, count) in self.totals.items():
            seconds.add_metric([part], total)
            calls.add_metric([part], count)
        return iter((seconds, calls))


class DraftedTokens(Collector):
    """What memories drafted; `totals`, by drafter, is refreshed with the steps' times."""

    totals: dict[str, tuple[int, int]]

    def __init__(self) -> None:
        self.totals = {}

    def collect(self) -> Iterator[Metric]:
        """Two counters by drafter."""
        drafted = CounterMetricFamily("memdec_drafted_tokens", "Tokens that memories drafted, as verified.", labels=["drafter"])
        accepted = CounterMetricFamily("memdec_accepted_tokens", "Drafted tokens that were accepted.", labels=["drafter"])
        for drafter, (tried, kept) in self.totals.items():
            drafted.add_metric([drafter], tried)
            accepted.add_metric([drafter], kept)
        return iter((drafted, accepted))


STEP_SECONDS, DRAFTED = StepSeconds(), DraftedTokens()
REGISTRY.register(STEP_SECONDS)
REGISTRY.register(DRAFTED)


class Timings:
    """Per-token observations by mode and domain; label lookups are done once, not per token."""

    def __init__(self, pairs: Iterable[Label]) -> None:
        self.first: dict[Label, Histogram] = {}
        self.next: dict[Label, Histogram] = {}
        self.mean: dict[Label, Histogram] = {}
        self.count: dict[Label, Counter] = {}
        self.know([NO_LABEL, *pairs])

    def know(self, labels: Iterable[Label]) -> None:
        """Prepare for further modes and domains. Those of domains that are unloaded stay: counters never go back."""
        for label in labels:
            self.first[label] = TIME_TO_FIRST_TOKEN.labels(*label)
            self.next[label] = INTER_TOKEN_LATENCY.labels(*label)
            self.mean[label] = TIME_PER_OUTPUT_TOKEN.labels(*label)
            self.count[label] = GENERATED_TOKENS.labels(*label)

    def tokens(self, label: Label, count: int, seconds: float, first: bool) -> None:
        """Count `count` new tokens that came `seconds` after the arrival (first) or after the previous ones.

        Tokens that come together share the time: what is compared between modes is the time per token.
        """
        if first:
            self.first[label].observe(seconds)
        else:
            for _ in range(count):
                self.next[label].observe(seconds / count)
        self.count[label].inc(count)

    def finished(self, label: Label, seconds: float) -> None:
        """A request of at least two tokens ended; `seconds` is its mean time per token after the first."""
        self.mean[label].observe(seconds)
