"""The locust users against a real server: every mode is asked for, streamed, plain and as a chat, and nothing fails."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
from conftest import ROOT, Server, metric


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
    statistics = (tmp_path / "run_stats.csv").read_text()
    for kind in ("streamed", "plain", "chat"):
        assert f" {kind}," in statistics


def test_a_server_that_refuses_counts_as_failures(server: Server, tmp_path: Path) -> None:
    """No silent retries: answers that are too long for the context fail, and locust says so."""
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--host", server.url, "--headless", "-u", "1", "-t", "2s",
         "--answer-tokens", "100000", "--only-summary"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "HTTP 400" in done.stdout + done.stderr
