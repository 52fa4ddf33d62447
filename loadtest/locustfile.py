"""Locust users of a memdec server; they measure time to first token and inter-token latency by mode and domain.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 4 -t 30s

Each user asks for completions, plain or streamed, and chats, in the domains and modes that the server offers, drawn from a seeded mix. Requests
come as a Poisson process per user (`--arrivals`), or one after the other. Nothing is retried: what fails counts as a failure.
"""

import itertools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task
from locust.runners import WorkerRunner

PROMPTS = {
    "biomed": (
        "The results of this study show that",
        "Patients with type 2 diabetes",
        "2.1. Materials and methods",
        "The expression of the gene",
    ),
    "finance": ("The Committee decided to", "Inflation expectations have", "Thank you, Mr. Chairman.", "The federal funds rate"),
    "law": (
        "This Agreement shall be governed by",
        "The Licensee shall not",
        "IN WITNESS WHEREOF, the parties",
        "Confidential Information means",
    ),
    "python": ("def __init__(self, ", "import os\nimport sys\n", "class Reader:\n", "    for line in lines:\n"),
    "none": ("In the early twentieth century,", "The album was released in", "The river flows through", "He was born in"),
}
CHATS = ("What is the result?", "Tell me about the method.", "Explain this.")
numbers = itertools.count()
samples: dict[str, list[float]] = {}
"""Milliseconds by `<mode> <domain> <what>`. Locust's own histograms have whole milliseconds, and no latencies within a stream."""


@events.init_command_line_parser.add_listener
def options(parser: Any) -> None:
    """What can be set from the command line."""
    group = parser.add_argument_group("memdec")
    group.add_argument("--seed", dest="mix_seed", type=int, default=0, help="seed of the prompt mix")
    group.add_argument("--arrivals", type=float, default=0.0, help="requests a second and user, a Poisson process; 0: one after the other")
    group.add_argument("--answer-tokens", type=int, default=32, help="tokens of an answer")
    group.add_argument("--modes", default="none,decoder,ngram,knn,rag", help="modes in the mix, where a domain has them")
    group.add_argument("--samples", default="", help="file for the raw latencies, JSON")


@events.init.add_listener
def report_latencies(environment: Any, **_: Any) -> None:
    """Collect latencies within streams apart from locust's statistics, which count requests."""

    def to_master(data: dict[str, Any], **_: Any) -> None:
        data["latencies"] = dict(samples)
        samples.clear()

    def from_worker(data: dict[str, Any], **_: Any) -> None:
        for name, values in data.get("latencies", {}).items():
            samples.setdefault(name, []).extend(values)

    def at_the_end(**_: Any) -> None:
        if not isinstance(environment.runner, WorkerRunner):
            write_latencies(environment.parsed_options)

    environment.events.report_to_master.add_listener(to_master)
    environment.events.worker_report.add_listener(from_worker)
    environment.events.quit.add_listener(at_the_end)


def write_latencies(options: Any) -> None:
    """Print the latencies; with `--csv` write them to `<prefix>_latencies.csv`, with `--samples` all values as JSON."""
    rows: list[tuple[Any, ...]] = [
        (name, len(values), statistics.fmean(values), *percentiles(values)) for name, values in sorted(samples.items())
    ]
    print(f"\n{'Latencies in streams, ms':<45}{'count':>8}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}")
    for name, count, *milliseconds in rows:
        print(f"{name:<45}{count:>8}" + "".join(f"{value:>9.1f}" for value in milliseconds))
    if options.csv_prefix:
        lines = ["Name,Count,Mean,50%,95%,99%", *(",".join(map(str, (n, c, *(round(v, 3) for v in ms)))) for n, c, *ms in rows)]
        Path(f"{options.csv_prefix}_latencies.csv").write_text("\n".join(lines) + "\n")
    if options.samples:
        Path(options.samples).write_text(json.dumps(samples))


def percentiles(values: list[float]) -> list[float]:
    """The 50th, 95th and 99th."""
    ordered = sorted(values)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 0.99)]


class MemdecUser(FastHttpUser):
    """One client, one request at a time."""

    def on_start(self) -> None:
        """Fetch the offered domains and modes, and seed this user's random sequence."""
        chosen = self.environment.parsed_options
        self.random = random.Random(f"{chosen.mix_seed} {next(numbers)}")
        wanted = chosen.modes.split(",")
        offered = [(mode, d["name"]) for d in self.client.get("/v1/domains", name="/v1/domains").json()["data"] for mode in d["modes"]]
        self.choices = [pair for pair in offered if pair[0] in wanted and pair[0] != "none"] + [("none", "none")] * ("none" in wanted)
        self.due = time.perf_counter()

    def wait_time(self) -> float:
        """Time until the next arrival; a user that is late goes on at once."""
        rate = self.environment.parsed_options.arrivals
        if not rate:
            return 0.0
        self.due += self.random.expovariate(rate)
        return max(0.0, self.due - time.perf_counter())

    def body(self) -> tuple[str, dict[str, Any]]:
        """Draw a mode and domain; returns their label and the fields of a request."""
        mode, domain = self.random.choice(self.choices)
        fields: dict[str, Any] = {"max_tokens": self.environment.parsed_options.answer_tokens, "ignore_eos": True, "temperature": 0.8}
        fields["seed"] = self.random.randrange(1 << 30)
        if domain != "none":
            fields |= {"domain": domain, "memory": mode}
        return f"{mode} {domain}", fields

    def prompt(self, label: str) -> str:
        """Draw a prompt of the label's domain."""
        return self.random.choice(PROMPTS.get(label.split()[1], PROMPTS["none"]))

    @task(3)
    def stream(self) -> None:
        """One streamed completion."""
        label, fields = self.body()
        self.read("/v1/completions", label, {**fields, "prompt": self.prompt(label), "stream": True})

    @task(1)
    def plain(self) -> None:
        """One completion in one piece."""
        label, fields = self.body()
        with self.client.post(
            "/v1/completions", json={**fields, "prompt": self.prompt(label)}, name=f"{label} plain", catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}: {response.text[:200]}")

    @task(1)
    def chat(self) -> None:
        """One streamed answer in a chat."""
        label, fields = self.body()
        messages = [{"role": "user", "content": self.random.choice(CHATS)}]
        self.read("/v1/chat/completions", label, {**fields, "messages": messages, "stream": True})

    def read(self, path: str, label: str, body: dict[str, Any]) -> None:
        """Read a stream, and record the latency of every event that holds tokens."""
        started = last = time.perf_counter()
        first = True
        kind = "chat" if "chat" in path else "streamed"
        with self.client.post(path, json=body, stream=True, name=f"{label} {kind}", catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}: {response.text[:200]}")
                return
            while line := response.stream.readline(b"\n"):  # as it arrives; iter_content would wait for whole blocks
                text = line.decode()
                if not text.startswith("data: {"):
                    continue
                event = json.loads(text[6:])
                if "error" in event:
                    response.failure(text[:200])
                    return
                choice = event["choices"][0]
                if choice.get("delta", {}).get("role"):  # a chat's opening event, before any token
                    continue
                now = time.perf_counter()
                took(label, "time to first token" if first else "inter-token latency", now - (started if first else last))
                last, first = now, False
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - started)  # locust's own ends with the answer's head
            if first:
                response.failure("a stream without a token")


def took(label: str, what: str, seconds: float) -> None:
    """Record one latency."""
    samples.setdefault(f"{label} {what}", []).append(round(1000 * seconds, 3))
