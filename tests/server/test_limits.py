"""A server with keys, limits, a JSON log and a trace collector: what each client may do, and what is written down of it."""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from asking import BASE, COMPLETIONS, ask, chat, refused, text
from conftest import Server, metric, start_server, stop_server
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from memdec.server.api.completions import _choices
from memdec.server.api.limits import Limits

pytestmark = pytest.mark.engine

OPERATOR, LAB, STRANGER = "sk-operator-7d1f", "sk-lab-93ab", "sk-stranger-55aa"
QUEUE = 8
SECRET_PROMPT = "the patient's name is"


class Collector(ThreadingHTTPServer):
    """What an OpenTelemetry collector does, in memory: spans by name."""

    spans: list[dict[str, Any]]


class Collect(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP."""

    server: Collector

    def do_POST(self) -> None:
        """One batch of spans."""
        batch = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in batch.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    self.server.spans.append({"name": span.name, "trace": span.trace_id.hex(), **values})
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A collector on a free port."""
    with Collector(("127.0.0.1", 0), Collect) as running:
        running.spans = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def guarded(toys: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").touch(0o600)
    (folder / "keys").write_text(f"{OPERATOR} name=ops\n{LAB} name=lab domains=b concurrent=2\n{STRANGER} domains=\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        running = start_server(
            folder / "log.txt", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--decoder", f"b={toys / 'qwen_b'}", "--dtype", "float32",
            "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--api-key-file", str(folder / "keys"),
            "--max-prompt-tokens", "100", "--max-output-tokens", "250", "--max-num-queued-reqs", str(QUEUE), "--max-choices", str(QUEUE), "--log-json",
            "--otlp-traces-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces", stderr=folder / "errors.txt",
        )  # fmt: skip
    yield running
    stop_server(running)


def client(server: Server, key: str | None) -> httpx.Client:
    """A client with a key."""
    return httpx.Client(base_url=server.url, timeout=120, headers={"Authorization": f"Bearer {key}"} if key else {})


@pytest.fixture
def ops(guarded: Server) -> Iterator[httpx.Client]:
    """The client that may use everything."""
    with client(guarded, OPERATOR) as found:
        yield found


@pytest.fixture
def lab(guarded: Server) -> Iterator[httpx.Client]:
    """The client of domain b."""
    with client(guarded, LAB) as found:
        yield found


def test_all_endpoints_but_health_need_a_key(guarded: Server) -> None:
    """Documentation, tokenizer and metrics included."""
    with client(guarded, None) as nobody, client(guarded, "sk-wrong") as wrong:
        assert nobody.get("/health").status_code == 200
        for method, path in (
            ("GET", "/v1/models"), ("GET", "/v1/domains"), ("GET", "/metrics"), ("GET", "/version"), ("GET", "/load"), ("GET", "/docs"),
            ("GET", "/openapi.json"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", COMPLETIONS), ("GET", "/nope"),
        ):  # fmt: skip
            refused(nobody.request(method, path), 401, None)
            refused(wrong.request(method, path), 401, None)


def test_a_key_of_one_domain(guarded: Server, ops: httpx.Client, lab: httpx.Client) -> None:
    """It sees that domain and no other, uses it and the base, and is told 403 of the others by header, body and alias."""
    assert [d["name"] for d in lab.get("/v1/domains").json()["data"]] == ["b"]
    assert [m["id"] for m in lab.get("/v1/models").json()["data"]] == ["base", "base:b"]
    assert [d["name"] for d in ops.get("/v1/domains").json()["data"]] == ["a", "b"]
    assert text(ask(lab)) == text(ask(ops)) and text(ask(lab, domain="b")) == text(ask(ops, model="base:b"))
    for answer in (
        ask(lab, domain="a"),
        ask(lab, {"X-Domain": "a"}),
        ask(lab, model="base:a"),
        chat(lab, domain="a"),
        lab.get("/v1/domains/a"),
    ):
        assert "Valid domains: b." in refused(answer, 403, "domain")
    refused(ask(lab, domain="a", memory="none"), 403, "domain")
    for answer in (ask(lab, domain="law"), ask(lab, model="base:law")):
        assert "Valid domains: b." in refused(answer, 404, "domain")
    assert "base:a" not in refused(ask(lab, model="nope"), 404, "model")
    refused(lab.get("/v1/models/base:a"), 404, "model")
    refused(lab.get("/metrics"), 403)
    with client(guarded, STRANGER) as stranger:
        assert stranger.get("/v1/domains").json()["data"] == []
        refused(ask(stranger, domain="b"), 403, "domain")
        text(ask(stranger))


def test_sizes(ops: httpx.Client) -> None:
    """Prompts, answers and choices over the server's limits name the field; who names no max_tokens gets the limit."""
    long = [5] * 101
    assert "at most 100" in refused(ask(ops, prompt=long, domain="a"), 400, "prompt")
    refused(ask(ops, prompt=[[5], long], stream=True), 400, "prompt")
    refused(chat(ops, messages=[{"role": "user", "content": "x " * 120}]), 400, "messages")
    text(ask(ops, prompt=long[1:]))
    refused(ask(ops, max_tokens=251), 400, "max_tokens")
    refused(chat(ops, max_completion_tokens=251), 400, "max_completion_tokens")
    refused(ask(ops, n=QUEUE + 1), 400, "n")
    refused(ask(ops, prompt=["x"] * (QUEUE + 1)), 400, "prompt")
    refused(ask(ops, prompt=["x"] * 3, n=3), 400, "n")
    open_ended = chat(ops, max_tokens=None, ignore_eos=True).json()
    assert open_ended["usage"]["completion_tokens"] == 250


def test_a_full_queue(ops: httpx.Client, guarded: Server) -> None:
    """503 with Retry-After, before a stream begins, and room again afterwards; a batch takes as many places as it has choices."""
    body = {**BASE, "max_tokens": 250, "ignore_eos": True, "stream": True, "n": QUEUE // 2, "temperature": 1}
    asked: tuple[dict[str, Any], ...] = ({}, {"stream": True}, {"prompt": ["x", "y"]}, {"domain": "a"})
    for _ in range(5):  # on a busy machine the streams may have ended before all have asked
        with ExitStack() as running:
            streams = [running.enter_context(ops.stream("POST", COMPLETIONS, json=body)).iter_lines() for _ in range(2)]
            assert all(next(events).startswith("data: {") for events in streams)
            answers = [ask(ops, **fields) for fields in asked]
        wait_until_idle(ops)
        if all(answer.status_code != 200 for answer in answers):
            break
    for answer in answers:
        refused(answer, 503)
        assert 1 <= int(answer.headers["retry-after"]) <= 4
    text(ask(ops, n=QUEUE, temperature=1))
    assert metric(ops.get("/metrics").text, "memdec_requests_total", status="503") >= 4


def wait_until_idle(ops: httpx.Client) -> None:
    """Until the engine has dropped what clients have left."""
    for _ in range(600):
        page = ops.get("/metrics").text
        if (
            metric(page, "vllm:num_requests_running") + metric(page, "vllm:num_requests_waiting") == 0
            and ask(ops, n=QUEUE, temperature=1).status_code == 200
        ):
            return
    raise AssertionError("requests are still under way")


def test_requests_of_one_key_at_once(ops: httpx.Client, lab: httpx.Client) -> None:
    """The third is a 429 with Retry-After while two are under way; other keys are served."""
    body = {**BASE, "max_tokens": 250, "ignore_eos": True, "stream": True}
    for _ in range(5):  # on a busy machine the streams may have ended before the third request is there
        with ExitStack() as running:
            streams = [running.enter_context(lab.stream("POST", COMPLETIONS, json=body)).iter_lines() for _ in range(2)]
            assert all(next(events).startswith("data: {") for events in streams)
            answer = ask(lab)
            if answer.status_code != 200:
                refused(answer, 429)
                assert answer.headers["retry-after"]
                assert lab.get("/v1/models").status_code == 200
                text(ask(ops))
                break
    else:
        raise AssertionError("a third request was always answered")
    for _ in range(600):
        if ask(lab).status_code == 200:
            return
    raise AssertionError("left requests are still counted")


def test_a_crowd_gets_answers_or_503(ops: httpx.Client) -> None:
    """40 at once on a queue of 8: each one way or the other."""
    with ThreadPoolExecutor(40) as pool:
        found = {a.status_code for a in pool.map(lambda i: ask(ops, max_tokens=20, domain="ab"[i % 2], stream=i % 3 == 0), range(40))}
    assert found == {200, 503}


def test_no_cross_origin_access(ops: httpx.Client, guarded: Server) -> None:
    """Browsers of other sites get no permission."""
    answer = ask(ops, {"Origin": "https://example.org"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    preflight = httpx.options(guarded.url + COMPLETIONS, headers={"Origin": "https://example.org", "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 400 and "access-control-allow-origin" not in preflight.headers


def logged(server: Server, **fields: Any) -> dict[str, Any]:
    """The line of a request with these fields. It is written after the answer has left, in any order with those of other connections."""
    for _ in range(100):
        lines = [json.loads(line) for line in server.text().splitlines()]
        for line in lines:
            if line["name"] == "memdec.requests" and fields.items() <= line.items():
                return dict(line)
        time.sleep(0.1)
    raise AssertionError(f"no line with {fields}: {lines[-3:]}")


def test_the_log(ops: httpx.Client, lab: httpx.Client, guarded: Server) -> None:
    """Every line of stdout is JSON; a request's has key, mode, domain, lambda and end; keys and prompts are nowhere; a header forges no line."""
    text(ask(lab, {"X-Request-Id": "forged"}, prompt=SECRET_PROMPT, domain="b", lam=0.25))
    refused(ops.get("/nope%0a%7b%22status%22%3a200%7d"), 404)
    refused(ask(ops, {"Authorization": "Bearer sk-secret-wrong"}, prompt=SECRET_PROMPT), 401)
    lines = [json.loads(line) for line in guarded.text().splitlines()]
    assert all({"asctime", "levelname", "name", "message"} <= line.keys() for line in lines)
    assert (
        logged(
            guarded, method="POST", path=COMPLETIONS, status=200, complete=True, key="lab", memory="decoder", domain="b", **{"lambda": 0.25}
        )["milliseconds"]
        > 0
    )
    logged(guarded, path='/nope\n{"status":200}', status=404)
    logged(guarded, path=COMPLETIONS, status=401, key=None)
    everything = guarded.text() + (guarded.log.parent / "errors.txt").read_text()
    for secret in (OPERATOR, LAB, STRANGER, "sk-secret-wrong", SECRET_PROMPT):
        assert secret not in everything
    assert "Traceback" not in everything


def test_spans(ops: httpx.Client, collector: Collector) -> None:
    """One a request, in the client's trace, with mode and domain."""
    wanted = {("decoder", "a"), ("none", "b"), ("none", "none")}
    asked: tuple[dict[str, Any], ...] = ({"domain": "a"}, {"domain": "b", "lam": 0}, {})
    for number, fields in enumerate(asked, 1):
        text(ask(ops, {"traceparent": f"00-{number:032x}-{number:016x}-01"}, **fields))
    found: set[tuple[str, str]] = set()
    for _ in range(100):
        mine = {s["trace"]: s for s in list(collector.spans) if s["name"] == "llm_request" and int(s["trace"], 16) <= 3}
        found = {(s["memdec.mode"], s["memdec.domain"]) for s in mine.values()}
        if found == wanted:
            break
        text(ask(ops, max_tokens=1))  # time passes
    assert found == wanted
    assert "gen_ai.usage.completion_tokens" in mine[f"{1:032x}"]


def test_labels_are_configured_names(ops: httpx.Client) -> None:
    """Whatever clients call domains, models and modes, the metrics know only what was loaded."""
    for name in ("law", 'x"} 1\nevil{', "a\0"):
        ask(ops, domain=name)
        ask(ops, model=f"base:{name}")
        ask(ops, {"X-Memory": "evil"}, domain="a")
    page = ops.get("/metrics").text
    domains = {
        part.split('"')[1]
        for line in page.splitlines()
        if line.startswith("memdec_")
        for part in line.split("{")[-1].split(",")
        if "domain=" in part
    }
    assert domains == {"a", "b", "none"}
    assert "evil" not in page
    assert os.environ.get("OTEL_BSP_SCHEDULE_DELAY") is None


def test_prompts_in_the_log_when_asked() -> None:
    """Texts as they are, chats and token ids as JSON; nothing unless asked."""
    asked: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "grüße", "n": 1, "max_tokens": 1}, "grüße"),
        ({"prompt": [5, 6], "n": 1, "max_tokens": 1}, "[5, 6]"),
        (
            {"messages": [{"role": "user", "content": "hi"}], "n": None, "max_tokens": 1, "max_completion_tokens": None},
            '[{"role": "user", "content": "hi"}]',
        ),
    ]
    for log_prompts in (True, False):
        state = SimpleNamespace(limits=Limits(log_json=True, log_prompts=log_prompts))
        for fields, written in asked:
            raw: Any = SimpleNamespace(app=SimpleNamespace(state=state), state=SimpleNamespace())
            request = type("Body", (SimpleNamespace,), {"model_fields": fields})(**fields)
            assert _choices(request, raw) == 1
            assert vars(raw.state) == ({"prompt": written} if log_prompts else {})
