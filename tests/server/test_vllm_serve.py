"""Our routes in vLLM's own server: the command that `memdec serve --print-vllm` prints, with two API server processes."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from asking import memory, refused
from conftest import ROOT, free_port, metric
from reference import greedy, hugging_face
from running import wait_until_ready

pytestmark = pytest.mark.slow

PROMPT = [300, 301, 302, 303]
TOKENS = 8
OPS, LAB = ({"Authorization": f"Bearer {key}"} for key in ("sk-ops", "sk-lab"))


@dataclass(frozen=True)
class Stock:
    """A running `vllm serve`."""

    url: str
    prometheus: Path
    """Where its processes keep their metrics."""
    log: Path


def entry_points(folder: Path) -> None:
    """What an installed memdec tells vLLM, for the tree that is being tested."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    made = folder / "memdec_tested-0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: memdec-tested\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in points.items()) for group, points in groups.items()]
    (made / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def stock(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """vLLM's launcher on the printed command, with two API servers."""
    root = tmp_path_factory.mktemp("stock")
    entry_points(root / "installed")
    (root / "prometheus").mkdir()
    (root / "keys").touch(0o600)
    (root / "keys").write_text("sk-ops name=ops\nsk-lab name=lab domains=b\n")
    options = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    options += ["--api-key-file", "keys", "--max-body-bytes", "5000", "--max-output-tokens", "20", "--log-json"]
    ask = [
        sys.executable,
        "-m",
        "memdec",
        "serve",
        str(toys / "base"),
        "--decoder",
        f"a={toys / 'qwen_a'}",
        "--decoder",
        f"b={toys / 'qwen_b'}",
    ]
    printed = subprocess.run([*ask, *options, "--print-vllm"], cwd=root, capture_output=True, text=True, timeout=300, check=True)
    words = shlex.split(printed.stdout.strip().splitlines()[-1])
    start = words.index("vllm")
    assert words[start : start + 2] == ["vllm", "serve"]
    environment = {
        **os.environ, **dict(word.split("=", 1) for word in words[:start]), "PYTHONPATH": f"{ROOT}:{root / 'installed'}", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PROMETHEUS_MULTIPROC_DIR": str(root / "prometheus"), "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    port, log = free_port(), root / "log.txt"
    command = [sys.executable, str(ROOT / "tests" / "vllm_serve.py"), *words[start + 1 :], "--api-server-count", "2", "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    wait_until_ready(process, log, 300, "Application startup complete", times=2)
    yield Stock(f"http://127.0.0.1:{port}", root / "prometheus", log)
    process.terminate()
    try:
        process.wait(60)
    finally:
        process.kill()


def test_two_api_servers(stock: Stock, toys: Path) -> None:
    """Both answer every domain like Hugging Face, refuse what we refuse, and their metrics add up."""
    torch.set_num_threads(1)
    base, a, b = (hugging_face(toys / name, torch.float32) for name in ("base", "qwen_a", "qwen_b"))
    expected = {name: greedy(base, decoder, PROMPT, TOKENS) for name, decoder in (("base", None), ("base:a", a), ("base:b", b))}
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    def ask(number: int) -> tuple[str, Any]:
        model = list(expected)[number % 3]
        answer = httpx.post(
            f"{stock.url}/v1/completions", json={**body, "model": model}, headers=OPS, timeout=120
        )  # a connection of its own
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model and memory(answer).get("domain", "base") == model.split(":")[-1]
        return model, answer.json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as pool:
        for model, got in pool.map(ask, range(60)):
            assert got == expected[model], model
    assert len(list(stock.prometheus.glob("counter_*.db"))) >= 2, "each API server had some of them"
    page = httpx.get(f"{stock.url}/metrics", headers=OPS).text
    assert metric(page, "memdec_generated_tokens_total", domain="a", mode="decoder") == 20 * TOKENS
    assert metric(page, "memdec_generated_tokens_total") == 60 * TOKENS == metric(page, "vllm:generation_tokens_total")
    assert metric(page, "memdec_requests_total", domain="b", status="200") == 20
    assert metric(page, "memdec_domain_info", domain="a") == 1
    assert [d["name"] for d in httpx.get(f"{stock.url}/v1/domains", headers=OPS).json()["data"]] == ["a", "b"]
    assert [m["id"] for m in httpx.get(f"{stock.url}/v1/models", headers=OPS).json()["data"]] == list(expected)
    refused(httpx.post(f"{stock.url}/v1/completions", json={**body, "model": "base", "domain": "c"}, headers=OPS), 404, "domain")
    refused(httpx.post(f"{stock.url}/v1/completions", json={**body, "model": "base:a", "lambda": 2}, headers=OPS), 400, "lambda")
    refused(httpx.post(f"{stock.url}/v1/domains", json={"name": "c", "path": "x"}, headers=OPS), 405)


def test_our_options_reach_it(stock: Stock) -> None:
    """Keys of all paths and of some domains, limits, the JSON log, and the time of the engine's steps: as with `memdec serve`."""
    with httpx.Client(base_url=stock.url, timeout=120) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/v1/domains", "/metrics", "/version", "/openapi.json"):
            refused(client.get(path), 401, None)
        assert [d["name"] for d in client.get("/v1/domains", headers=LAB).json()["data"]] == ["b"]
        refused(client.get("/metrics", headers=LAB), 403)
        body = {"model": "base:b", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        refused(client.post("/v1/completions", json={**body, "model": "base:a"}, headers=LAB), 403, "domain")
        refused(client.post("/v1/completions", json={**body, "max_tokens": 21}, headers=LAB), 400, "max_tokens")
        refused(client.post("/v1/completions", json={**body, "prompt": "x" * 6000}, headers=LAB), 413)
        assert client.post("/v1/completions", json=body, headers=LAB).status_code == 200
        pages = [client.get("/metrics", headers=OPS).text for _ in range(2)]
        assert all(metric(page, "memdec_step_seconds_total", part="base") > 0 for page in pages)
        assert metric(pages[0], "memdec_step_calls_total", part="base") >= 4
        client.post("/v1/completions", json=body, headers=LAB)
        assert metric(client.get("/metrics", headers=OPS).text, "memdec_step_calls_total", part="base") > metric(
            pages[1], "memdec_step_calls_total", part="base"
        )
    lines = [json.loads(line) for line in stock.log.read_text().splitlines() if '"memdec.requests"' in line]
    assert any(line["key"] == "lab" and line["domain"] == "b" and line["status"] == 200 for line in lines)
    assert "sk-" not in stock.log.read_text()
