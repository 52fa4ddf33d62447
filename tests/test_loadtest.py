"""The locust users against a real server: every mode is asked for, streamed, plain and as a chat, and nothing fails."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, Server, metric

pytestmark = pytest.mark.slow


def test_users_cover_every_mode_and_agree_with_the_server(server: Server, tmp_path: Path) -> None:
    """Each latency a client sees is a token that the server counts; the raw samples and locust's statistics are both there."""
    before = httpx.get(f"{server.url}/metrics").text
    samples = tmp_path / "samples.json"
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--host", server.url, "--headless", "-u", "8", "-r", "8", "-t", "15s",
         "--stop-timeout", "60", "--csv", str(tmp_path / "run"), "--samples", str(samples), "--answer-tokens", "6", "--arrivals", "4", "--only-summary"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = httpx.get(f"{server.url}/metrics").text
    seen = json.loads(samples.read_text())
    pairs = [("none", "none"), ("decoder", "a"), ("decoder", "b"), ("knn", "a"), ("rag", "a")]
    for mode, domain in pairs:
        first, following = seen[f"{mode} {domain} time to first token"], seen[f"{mode} {domain} inter-token latency"]
        assert len(first) > 0 and len(following) > 0 and min(first + following) > 0
        counted = metric(page, "memdec_generated_tokens_total", mode=mode, domain=domain) - metric(
            before, "memdec_generated_tokens_total", mode=mode, domain=domain
        )
        assert len(first) + len(following) <= counted  # plain answers' tokens are counted too
    rows = {row["Name"]: row for row in csv.DictReader((tmp_path / "run_stats.csv").open())}
    kinds = {name: int(row["Request Count"]) for name, row in rows.items() if name.endswith((" streamed", " plain", " chat"))}
    assert {name.split()[-1] for name in kinds} == {"streamed", "plain", "chat"}
    asked = sum(kinds.values()) + int(rows["/v1/domains"]["Request Count"])
    assert int(rows["Aggregated"]["Request Count"]) == asked, "a row of requests alone"
    streams = sum(count for name, count in kinds.items() if not name.endswith("plain"))
    assert sum(len(values) for name, values in seen.items() if name.endswith("first token")) >= streams  # the file may be a second old
    latencies = {row["Name"]: int(row["Count"]) for row in csv.DictReader((tmp_path / "run_latencies.csv").open())}
    assert latencies == {name: len(values) for name, values in seen.items()}


WORKER = """
import json, sys
from argparse import Namespace
from types import SimpleNamespace
from locust.env import Environment
sys.path.insert(0, "loadtest")
import locustfile
environment = Environment(parsed_options=Namespace(csv_prefix=None, samples=sys.argv[1]))
environment.runner = SimpleNamespace()
locustfile.report_latencies(environment)
locustfile.took("decoder a", "time to first token", 0.25)
report = {}
environment.events.report_to_master.fire(client_id="w", data=report)
assert locustfile.samples == {}, "what is sent is not kept"
for _ in range(2):
    environment.events.worker_report.fire(client_id="w", data=json.loads(json.dumps(report)))
environment.events.quit.fire(exit_code=0)
"""


def test_workers_send_their_latencies_to_the_master(tmp_path: Path) -> None:
    """As locust's own statistics, with every report; the master adds them up. In a process of its own: locust patches Python's sockets."""
    samples = tmp_path / "samples.json"
    done = subprocess.run([sys.executable, "-c", WORKER, str(samples)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(samples.read_text()) == {"decoder a time to first token": [250.0, 250.0]}


def test_a_server_that_refuses_counts_as_failures(server: Server, tmp_path: Path) -> None:
    """No silent retries: answers that are too long for the context fail, and locust says so."""
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--host", server.url, "--headless", "-u", "1", "-t", "2s",
         "--answer-tokens", "100000", "--only-summary"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "HTTP 400" in done.stdout + done.stderr


def test_the_gpu_benchmark_runs_to_its_last_line() -> None:
    """On a CPU with tiny models: what it prints is a table and one JSON line."""
    command = [
        sys.executable,
        str(ROOT / "loadtest" / "bench_gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--batches",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last["ratio"]) == {"1.5B+0.5B b2", "7B+0.5B b2"}
    assert all(row["floor"] == 2.0 and row["in turn"] > 0 for row in last["ratio"].values())


def test_the_benchmarks_report_and_ratios() -> None:
    """Every key that is promised, from figures made up."""
    sys.path.insert(0, str(ROOT / "loadtest"))
    from bench_report import ratio, report

    row = {"ms": {"median": 2.0, "min": 1.0, "max": 3.0}, "ratio": {"median": 1.2, "min": 1.1, "max": 1.3}}
    names = ("plain", "no_domain", "one_domain", "two_domains", "reference")
    found = {
        "hardware": "h", "runs": {"1": "commit c"}, "floor": {"37M": 1.1, "0.1B": 1.3},
        "shapes": {f"b{n}": dict.fromkeys(names, row) for n in (1, 8, 32)},
        "embedded": {f"b{n} {way}": {"adaptive": {**row, "acceptance": {"law": [0.9]}}} for n in (1, 8, 32) for way in ("greedy", "sampled")},
    }  # fmt: skip
    for batch in ratio(found).values():
        assert set(batch) == {
            "no_domain", "one_domain", "one_domain_over_floor", "two_domains", "two_domains_over_floor", "reference", "speculative_greedy",
            "speculative_sampled",
        }  # fmt: skip
        assert batch["one_domain_over_floor"] == 1.091
        assert batch["two_domains_over_floor"] == 1.0
    assert "| 8 | two_domains | 2.00 | **1.20** (1.10 to 1.30) |" in report(found)
