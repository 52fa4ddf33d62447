"""Locust users of a running server: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 4 -t 30s`.

Each user streams completions in a domain drawn from what the server offers, or in none, and reports time to first token and
inter-token latency as requests of their own, by domain.
"""

import json
import random
import time

from locust import FastHttpUser, between, events, task

PROMPTS = (
    "The results of this study show that",
    "The Committee decided to",
    "This Agreement shall be governed by",
    "def __init__(self, ",
    "In the early twentieth century,",
)


class CompletionUser(FastHttpUser):
    """One client that streams, one request at a time."""

    wait_time = between(0.0, 0.2)

    def on_start(self) -> None:
        """Ask what there is to choose from."""
        domains = self.client.get("/v1/domains").json()["data"]
        self.choices = [None, *(d["name"] for d in domains)]

    @task
    def stream(self) -> None:
        """One streamed completion."""
        domain = random.choice(self.choices)
        body = {"prompt": random.choice(PROMPTS), "max_tokens": 32, "stream": True, "ignore_eos": True}
        if domain is not None:
            body["domain"] = domain
        started = time.perf_counter()
        with self.client.post("/v1/completions", json=body, stream=True, name=f"completion {domain}", catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}")
                return
            self._read(response, domain, started)

    def _read(self, response: object, domain: str | None, started: float) -> None:
        last, first = started, True
        for line in response.iter_lines():
            text = line.decode() if isinstance(line, bytes) else line
            if not text.startswith("data: ") or text == "data: [DONE]":
                continue
            if "error" in json.loads(text[6:]):
                response.failure(text)
                return
            now = time.perf_counter()
            name = "time to first token" if first else "inter-token latency"
            events.request.fire(
                request_type=str(domain), name=name, response_time=(now - last) * 1000, response_length=0, exception=None, context={}
            )
            last, first = now, False
