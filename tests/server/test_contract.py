"""The HTTP contract: choosing domain, lambda and mode, and what the server says of itself."""

import json
import subprocess
import time
from typing import Any

import httpx
import pytest
from asking import BASE, COMPLETIONS, PROMPT, ask, chat, memory, refused, text
from conftest import metric
from openai import BadRequestError, NotFoundError, OpenAI

pytestmark = pytest.mark.engine

USED = {"mode": "decoder", "domain": "a", "lambda": "0.6"}


def test_three_ways_to_choose(http: httpx.Client, sdk: OpenAI) -> None:
    """Header, body field and alias give the same text and headers; the answer's model is the one asked for."""
    by_header = ask(http, headers={"X-Domain": "a"})
    by_alias = ask(http, model="base:a")
    by_body = sdk.completions.with_raw_response.create(**BASE, extra_body={"domain": "a"})  # type: ignore[call-overload]
    texts = {text(by_header), text(by_alias), by_body.parse().choices[0].text}
    assert len(texts) == 1
    assert memory(by_header) == memory(by_alias) == USED
    assert {name: by_body.headers[f"x-memory-{name}"] for name in USED} == USED
    assert [by_header.json()["model"], by_alias.json()["model"], by_body.parse().model] == ["base", "base:a", "base"]
    assert text(ask(http, headers={"X-Domain": "a"}, model="base:a", domain="a")) in texts


def test_domains_differ(http: httpx.Client) -> None:
    """Each domain and the base write something else, in completions and in chats."""
    assert len({text(ask(http, domain=domain)) for domain in (None, "a", "b")}) == 3
    chats = [chat(http, domain=domain) for domain in (None, "a", "b")]
    assert len({c.json()["choices"][0]["message"]["content"] for c in chats}) == 3
    assert [memory(c).get("domain") for c in chats] == [None, "a", "b"]
    assert memory(chats[0]) == {"mode": "none"}


def test_lambda_by_body_and_header(http: httpx.Client) -> None:
    """Both set it, and the answer's header tells it."""
    wanted: dict[str, Any] = {"domain": "a", "logprobs": 2}
    by_body, by_header = ask(http, **wanted, lam=0.25), ask(http, {"X-Lambda": "0.25"}, **wanted)
    assert by_body.json()["choices"] == by_header.json()["choices"]
    assert memory(by_body) == memory(by_header) == {**USED, "lambda": "0.25"}
    both = ask(http, {"X-Lambda": "0.250"}, **wanted, lam=0.25)
    assert both.json()["choices"] == by_body.json()["choices"]
    assert ask(http, **wanted).json()["choices"] != by_body.json()["choices"]


@pytest.mark.parametrize("off", [{"lam": 0}, {"lam": 0.0}, {"memory": "none"}])
def test_switched_off_is_the_base_exactly(http: httpx.Client, off: dict[str, Any]) -> None:
    """Lambda 0 and memory none: the base's log-probabilities, bit by bit, of the prompt too."""
    wanted: dict[str, Any] = {"logprobs": 5, "echo": True}
    plain, switched = ask(http, **wanted), ask(http, domain="a", **wanted, **off)
    assert switched.json()["choices"] == plain.json()["choices"]
    assert memory(switched) == {"lambda": "0", "domain": "a", "mode": "none"}


def test_lambda_one(http: httpx.Client) -> None:
    """The decoder alone: finite log-probabilities, and another text than the base's."""
    answer = ask(http, domain="a", lam=1, logprobs=1)
    assert text(answer) != text(ask(http)) and memory(answer)["lambda"] == "1"
    assert all(-50 < value <= 0 for value in answer.json()["choices"][0]["logprobs"]["token_logprobs"])


def test_modes(http: httpx.Client) -> None:
    """Decoder is the default; body and header name others."""
    assert text(ask(http, domain="a", memory="decoder")) == text(ask(http, domain="a"))
    assert memory(ask(http, {"X-Memory": "none"}, domain="a"))["mode"] == "none"
    assert memory(ask(http, memory="none")) == {"mode": "none"}
    for mode in ("knn", "rag"):
        assert "no datastore" in refused(ask(http, domain="b", memory=mode), 400, "memory")


def test_null_is_not_given(http: httpx.Client) -> None:
    """Null in a field is as if the field were not there."""
    assert text(ask(http, domain=None, lam=None, memory=None)) == text(ask(http))
    assert memory(ask(http, domain="a", lam=None, memory=None)) == USED
    assert memory(ask(http, {"X-Domain": "a"}, domain=None, vllm_xargs=None)) == USED


def test_sdk_exceptions(sdk: OpenAI) -> None:
    """OpenAI's client raises its own classes, with param and message."""
    with pytest.raises(NotFoundError) as unknown:
        sdk.completions.create(model="base:law", prompt=PROMPT)
    assert unknown.value.param == "domain" and "a, b" in unknown.value.message
    with pytest.raises(BadRequestError) as bad:
        sdk.chat.completions.create(model="base:a", messages=[{"role": "user", "content": "x"}], extra_body={"lambda": 2})
    assert bad.value.param == "lambda"


def curl(http: httpx.Client, path: str, *arguments: str) -> str:
    """What curl prints, with the status as its last line."""
    command = ["curl", "-sS", "--max-time", "120", "-w", "\n%{http_code}", *arguments, str(http.base_url.join(path))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_curl(http: httpx.Client) -> None:
    """The same with curl: plain, streamed, refused."""
    sent = ["-H", "Content-Type: application/json", "-H", "X-Domain: a", "-d"]
    body, _, status = curl(http, COMPLETIONS, *sent, json.dumps(BASE)).rpartition("\n")
    assert status == "200" and json.loads(body)["choices"][0]["text"] == text(ask(http, domain="a"))
    streamed = curl(http, COMPLETIONS, "-N", *sent, json.dumps({**BASE, "stream": True}))
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]" and "".join(json.loads(e)["choices"][0]["text"] for e in events) == text(ask(http, domain="a"))
    body, _, status = curl(http, COMPLETIONS, *sent, json.dumps({**BASE, "domain": "b"})).rpartition("\n")
    assert status == "400" and json.loads(body)["error"]["param"] == "domain"


def test_models(http: httpx.Client, sdk: OpenAI) -> None:
    """The base and an alias a domain, with parent and root; unknown names are 404s that list the valid ones."""
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert list(models) == [model.id for model in sdk.models.list()] == ["base", "base:a", "base:b"]
    assert [(m["root"], m["parent"], m["max_model_len"]) for m in models.values()] == [
        ("base", None, 512),
        ("a", "base", 512),
        ("b", "base", 512),
    ]
    for name, card in models.items():
        assert http.get(f"/v1/models/{name}").json() == card
        assert sdk.models.retrieve(name).id == name
    for name in ("nope", "base:law", "a/b", "x" * 5000):
        assert "base, base:a, base:b" in refused(http.get(f"/v1/models/{name}"), 404, "model")


def test_domains(http: httpx.Client) -> None:
    """Everything a client needs to choose."""
    listed = http.get("/v1/domains").json()
    assert listed["object"] == "list" and [d["name"] for d in listed["data"]] == ["a", "b"]
    for domain in listed["data"]:
        assert domain["lambda"] == 0.6 and domain["lambda_tuned"] is False and {"decoder", "none"} <= set(domain["modes"])
        assert domain["size_bytes"] > 0 and domain["tokenizer_hash"] and domain["perplexity"] is None
        assert http.get(f"/v1/domains/{domain['name']}").json() == domain
    assert len({d["revision"] for d in listed["data"]}) == 2
    assert "a, b" in refused(http.get("/v1/domains/law"), 404, "domain")


@pytest.mark.parametrize("model", ["base", "base:a"])
def test_tokenize_round_trip(http: httpx.Client, model: str) -> None:
    """Ids and back, under the base's name and under an alias."""
    tokens = http.post("/tokenize", json={"model": model, "prompt": PROMPT}).json()["tokens"]
    assert tokens and http.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"] == PROMPT
    refused(http.post("/tokenize", json={"model": "nope", "prompt": PROMPT}), 404, "model")


def test_probes(http: httpx.Client) -> None:
    """/health and /version."""
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["version"]


def labels(page: str, name: str) -> set[str]:
    """All values of a label on our metrics."""
    samples = [line for line in page.splitlines() if line.startswith("memdec_")]
    return {
        part.split('"')[1]
        for line in samples
        for part in line.partition("{")[2].partition("}")[0].split(",")
        if part.startswith(f"{name}=")
    }


def test_metrics(http: httpx.Client) -> None:
    """All of ours are there, by configured domain only; tokens add up to vLLM's count; errors count under their status."""
    before = http.get("/metrics").text
    refused(ask(http, domain="made-up"), 404)
    refused(ask(http, domain="a", prompt="x " * 2000), 400)
    refused(ask(http, domain="a", stream=True, logit_bias={"99999": 1}), 400)
    text(ask(http, domain="a"))
    text(ask(http, domain="b", memory="none"))
    answered = {
        key: metric(http.get("/metrics").text, "memdec_requests_total", **dict(key)) - metric(before, "memdec_requests_total", **dict(key))
        for key in (
            (("domain", "none"), ("status", "404")),
            (("domain", "a"), ("mode", "decoder"), ("status", "400")),
            (("domain", "a"), ("mode", "decoder"), ("status", "200")),
            (("domain", "b"), ("mode", "none"), ("status", "200")),
        )
    }
    assert list(answered.values()) == [1, 2, 1, 1]
    page = http.get("/metrics").text
    assert labels(page, "domain") == {"none", "a", "b"} and labels(page, "mode") == {"none", "decoder", "knn", "rag"}
    assert "made-up" not in page
    names = ("memdec_time_to_first_token_seconds", "memdec_inter_token_latency_seconds")
    assert all(metric(page, f"{name}_count", domain=domain) > 0 for name in names for domain in ("a", "none"))
    assert metric(page, "memdec_requests_total", status="500") == 0


def test_token_counts_agree(http: httpx.Client) -> None:
    """Our tokens over all domains are vLLM's, whatever the session's tests have done."""
    before = http.get("/metrics").text
    used = ask(http, domain="b", max_tokens=5).json()["usage"]["completion_tokens"]
    for mode in ({"memory": "knn"}, {"memory": "rag"}, {"memory": "rag", "rag_stride": 2, "ignore_eos": True}):
        text(ask(http, domain="a", **mode))
    deadline = time.monotonic() + 60  # the engine counts after it has answered
    while True:
        page = http.get("/metrics").text
        ours, theirs = metric(page, "memdec_generated_tokens_total"), metric(page, "vllm:generation_tokens_total")
        mine = metric(page, "memdec_generated_tokens_total", domain="b") - metric(before, "memdec_generated_tokens_total", domain="b")
        if (ours == theirs and mine == used) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert ours == theirs > 0 and mine == used
