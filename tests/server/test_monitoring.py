"""Prometheus rules, the dashboard, and shadows: against the real Prometheus where it is installed (Debian: prometheus)."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import BASE, ask, text
from conftest import ROOT, Server, free_port, metric, start_server, stop_server
from tools import needs

from memdec.server.engine.shadows import baselines_of

pytestmark = pytest.mark.engine

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "memdec.json"
with_prometheus = needs("promtool", "Debian: apt install prometheus")
METRIC = re.compile(r"\b(?:memdec_|vllm:|memdec:)[\w:]+")


@pytest.fixture(scope="module")
def shadowed(toys: Path, retrieval: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own that replays every decoder request."""
    running = start_server(
        tmp_path_factory.mktemp("shadowed") / "log.txt", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--decoder", f"b={toys / 'qwen_b'}",
        "--datastore", f"a={retrieval}", "--baseline-sample-rate", "1", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
        "--kv-cache-memory-bytes", str(128 << 20), "--enable-prompt-tokens-details",
    )  # fmt: skip
    yield running
    stop_server(running)


def page_when(url: str, name: str, least: float, **labels: str) -> str:
    """The metrics page, as soon as a metric has reached a value."""
    deadline = time.monotonic() + 60
    while True:
        page = httpx.get(f"{url}/metrics").text
        if metric(page, name, **labels) >= least or time.monotonic() > deadline:
            return page
        time.sleep(0.2)


def test_shadows_replay_decoder_requests_alone(shadowed: Server) -> None:
    """Each decoder request once with the base and once with each baseline of its domain, as many tokens; others not at all."""
    with httpx.Client(base_url=shadowed.url, timeout=60) as http:
        for _ in range(2):
            text(ask(http, domain="a", ignore_eos=True))
        text(ask(http, domain="b", ignore_eos=True))
        for fields in ({"memory": "knn"}, {"memory": "rag"}, {"lam": 0}):
            text(ask(http, domain="a", ignore_eos=True, **fields))
        text(ask(http))
    page = page_when(shadowed.url, "memdec_shadows_total", 7, outcome="done")
    done = {
        (m, d): metric(page, "memdec_shadows_total", mode=m, domain=d, outcome="done") for m in ("none", "knn", "rag") for d in ("a", "b")
    }
    assert done == {("none", "a"): 2, ("knn", "a"): 2, ("rag", "a"): 2, ("none", "b"): 1, ("knn", "b"): 0, ("rag", "b"): 0}
    assert metric(page, "memdec_shadows_total", outcome="failed") == 0
    tokens = {m: metric(page, "memdec_generated_tokens_total", mode=m, domain="a") for m in ("decoder", "knn", "rag", "none")}
    assert tokens == {"decoder": 16, "knn": 24, "rag": 24, "none": 24}
    assert metric(page, "memdec_generated_tokens_total") == metric(page, "vllm:generation_tokens_total")
    assert metric(page, "memdec_requests_total") == 7  # clients' alone


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "mine"}])
@pytest.mark.parametrize("guess", [{}, {"domain": "a", "memory": "knn"}])
def test_replays_warm_no_clients_cache(shadowed: Server, salt: dict[str, Any], guess: dict[str, Any]) -> None:
    """Who guesses a prompt that another client sent finds none of it in the prefix cache, though it was replayed in all modes."""
    prompt = f"{salt} {guess} " + "the patient's name is " * 40
    before = metric(httpx.get(f"{shadowed.url}/metrics").text, "memdec_shadows_total", outcome="done", domain="a")
    with httpx.Client(base_url=shadowed.url, timeout=60) as http:
        text(ask(http, prompt=prompt, domain="a", max_tokens=1, **salt))
        page_when(shadowed.url, "memdec_shadows_total", before + 3, outcome="done", domain="a")
        usage = ask(http, prompt=prompt, max_tokens=1, **guess).json()["usage"]
        assert usage["prompt_tokens"] > 200 and not (usage["prompt_tokens_details"] or {}).get("cached_tokens")
        own = ask(http, prompt=prompt, domain="a", max_tokens=1, **salt).json()["usage"]
        assert own["prompt_tokens_details"]["cached_tokens"] > 0, "the client's own is remembered"


def test_steps_are_timed_by_part(shadowed: Server) -> None:
    """Base, memory, search and mixing each took time."""
    with httpx.Client(base_url=shadowed.url, timeout=60) as http:
        text(ask(http, domain="a"))
        text(ask(http, domain="a", memory="knn"))
    page = page_when(shadowed.url, "memdec_step_calls_total", 1, part="search")
    for part in ("base", "memory", "search", "mixing"):
        assert metric(page, "memdec_step_seconds_total", part=part) > 0
        assert metric(page, "memdec_step_calls_total", part=part) > 0
    assert metric(page, "memdec_build_info", base="base") == 1


def test_baselines_by_domain() -> None:
    """The base for all; kNN-LM and RAG where there is a datastore."""
    assert baselines_of({"a": 0.3}, ["a", "b"]) == {"a": (("none", 0.0), ("knn", 0.3), ("rag", 0.0)), "b": (("none", 0.0),)}


def test_n_grams_are_a_baseline() -> None:
    """After the others, where a domain has some."""
    assert baselines_of({"a": 0.3}, ["a", "b"], {"b": 0.2}) == {
        "a": (("none", 0.0), ("knn", 0.3), ("rag", 0.0)),
        "b": (("none", 0.0), ("ngram", 0.2)),
    }


def expressions() -> list[str]:
    """Every query of the dashboard and the rules."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rules = re.findall(
        r"expr: (?:>-\n)?(.*?)(?=\n +(?:labels|for|- record|- alert)|\n\n|\Z)", (PROMETHEUS / "rules.yml").read_text(), re.DOTALL
    )
    return [t["expr"] for p in panels for t in p["targets"]] + rules


def test_queries_name_metrics_that_exist(shadowed: Server) -> None:
    """Ours and vLLM's on the page, recorded ones in the rules."""
    page = page_when(shadowed.url, "memdec_shadows_total", 1, outcome="done")
    recorded = set(re.findall(r"record: (\S+)", (PROMETHEUS / "rules.yml").read_text()))
    named = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(expressions()) > 20 and len(named) >= 10
    for name in named:
        assert name in recorded or re.search(rf"^{name}[ {{]", page, re.MULTILINE), name


@with_prometheus
def test_promtool_checks_config_and_rules() -> None:
    """Syntax, and the unit tests beside the rules."""
    for arguments in (("check", "config", "prometheus.yml"), ("test", "rules", "rules.test.yml")):
        done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@with_prometheus
def test_a_real_prometheus_records_the_ratio(shadowed: Server, tmp_path: Path) -> None:
    """It scrapes the server, and after a few requests the recording rules give decoder ÷ knn, rag and base; all panels answer."""
    rules = (PROMETHEUS / "rules.yml").read_text().replace("[5m]", "[20s]").replace("interval: 15s", "interval: 1s")
    (tmp_path / "rules.yml").write_text(rules)
    target = shadowed.url.removeprefix("http://")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nrule_files: [rules.yml]\n"
        f"scrape_configs: [{{job_name: memdec, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    port = free_port()
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("wb") as log:
        prometheus = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as query:
            found: set[str] = set()
            deadline = time.monotonic() + 60
            while found != {"knn", "rag", "base"} and time.monotonic() < deadline:
                httpx.post(
                    f"{shadowed.url}/v1/completions", json={**BASE, "domain": "a", "ignore_eos": True}, timeout=60
                ).raise_for_status()
                time.sleep(0.5)
                try:
                    answer = query.get("/api/v1/query", params={"query": 'memdec:inter_token_latency:ratio{quantile="0.5"}'}).json()
                except httpx.ConnectError:
                    continue
                found = {r["metric"]["baseline"] for r in answer["data"]["result"] if float(r["value"][1]) > 0}
            assert found == {"knn", "rag", "base"}, (tmp_path / "log").read_text()[-2000:]
            for panel in json.loads(DASHBOARD.read_text())["panels"]:
                for t in panel["targets"]:
                    filled = t["expr"].replace("$__rate_interval", "20s").replace("$mode", ".*").replace("$domain", ".*")
                    answer = query.get("/api/v1/query", params={"query": filled}).json()
                    assert answer["status"] == "success" and answer["data"]["result"], t["expr"]
    finally:
        prometheus.terminate()
        prometheus.wait(20)
