"""/v1/responses: a memory as for chats; stored, streamed, cancelled; what isn't served is named."""

import json
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from asking import chat, memory, refused
from conftest import Server, metric
from openai import OpenAI

from memdec.server.api import absent
from memdec.server.api.responses import Stored, _find
from memdec.server.errors import UnknownResponse
from memdec.server.routing.selection import Selection

pytestmark = pytest.mark.engine

RESPONSES = "/v1/responses"
INPUT = {"model": "base", "input": "hello there", "max_output_tokens": 8, "temperature": 0}
USED = {"domain": "a", "mode": "decoder", "lambda": "0.6"}


def respond(http: httpx.Client, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """A greedy response; `lam` is the field that Python can't name."""
    return http.post(RESPONSES, json={**INPUT, **{"lambda" if k == "lam" else k: v for k, v in fields.items()}}, headers=headers)


def said(answer: httpx.Response) -> str:
    """The text of an answer that must be a success."""
    assert answer.status_code == 200, answer.text
    return "".join(part["text"] for item in answer.json()["output"] for part in item["content"])


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream."""
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def settled(http: httpx.Client, response_id: str) -> httpx.Response:
    """A background response, when it is no longer under way."""
    for _ in range(600):
        answer = http.get(f"{RESPONSES}/{response_id}")
        if answer.json()["status"] not in ("queued", "in_progress"):
            return answer
        time.sleep(0.1)
    raise AssertionError(answer.text)


def in_chat(http: httpx.Client, **fields: Any) -> str:
    """What a chat with the same message says."""
    return str(chat(http, **fields).json()["choices"][0]["message"]["content"])


def test_a_memory_as_in_chats(http: httpx.Client) -> None:
    """Body, header and alias; plain and streamed; without a domain the base."""
    wanted = in_chat(http, domain="a")
    for fields in ({"domain": "a"}, {"model": "base:a"}, {"headers": {"X-Domain": "a"}}):
        answer = respond(http, **fields)
        assert said(answer) == wanted and memory(answer) == USED
        assert answer.json()["model"] == fields.get("model", "base")
    assert said(respond(http)) == in_chat(http) != wanted
    assert said(respond(http, domain="a", lam=0.3)) == in_chat(http, domain="a", **{"lambda": 0.3})
    streamed = respond(http, domain="a", stream=True)
    told = events(streamed)
    assert "".join(e["delta"] for e in told if e["type"] == "response.output_text.delta") == wanted and memory(streamed) == USED
    assert told[-1]["type"] == "response.completed" and [e["sequence_number"] for e in told] == list(range(len(told)))


def test_other_modes(http: httpx.Client) -> None:
    """kNN-LM mixes, RAG reads a passage, which counts as input: plain, streamed and stored."""
    assert said(respond(http, domain="a", memory="knn")) == in_chat(http, domain="a", memory="knn")
    plain, found = respond(http).json()["usage"], respond(http, domain="a", memory="rag")
    usage = found.json()["usage"]
    assert memory(found) == {"domain": "a", "mode": "rag"} and usage["input_tokens"] > plain["input_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert events(respond(http, domain="a", memory="rag", stream=True))[-1]["response"]["usage"]["input_tokens"] == usage["input_tokens"]
    assert http.get(f"{RESPONSES}/{found.json()['id']}").json()["usage"] == usage


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"domain": "nope"}, 404, "domain"),
        ({"domian": "a"}, 400, "domian"),
        ({"lam": 0.5}, 400, "lambda"),
        ({"model": "nope"}, 404, "model"),
        ({"domain": "a", "vllm_xargs": {"domain": "b"}}, 400, "vllm_xargs"),
        ({"max_output_tokens": 100_000}, 400, "max_output_tokens"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": "x " * 600}, 400, None),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"input": 5}, 400, None),
        ({"previous_response_id": "nope"}, 404, "previous_response_id"),
        ({"guided_json": {}}, 400, "guided_json"),
    ],
    ids=str,
)
def test_refusals(http: httpx.Client, fields: dict[str, Any], status: int, param: str | None) -> None:
    """An HTTP error before a stream begins, not an event in it."""
    for stream in (False, True):
        answer = respond(http, **{"domain": "a", **fields} if "lam" not in fields else fields, stream=stream)
        refused(answer, status, *([param] if param else []))


def test_stored_and_continued(http: httpx.Client, sdk: OpenAI) -> None:
    """As vLLM stores; the next one names its own memory; an id is nobody else's."""
    first = sdk.responses.create(model="base", input="hello there", max_output_tokens=5, temperature=0, extra_body={"domain": "a"})
    assert sdk.responses.retrieve(first.id).output_text == first.output_text
    assert memory(http.get(f"{RESPONSES}/{first.id}")) == USED
    following = sdk.responses.with_raw_response.create(
        model="base:b", input="and then?", previous_response_id=first.id, max_output_tokens=5, temperature=0
    )
    assert following.headers["x-memory-domain"] == "b"
    assert following.parse().usage.input_tokens > first.usage.input_tokens + 5  # type: ignore[union-attr]
    refused(respond(http, request_id=first.id), 400, "request_id")
    refused(http.get(f"{RESPONSES}/{first.id}", params={"stream": True}), 400, "stream")
    unstored = respond(http, store=False).json()["id"]
    refused(http.get(f"{RESPONSES}/{unstored}"), 404, "response_id")


def test_background(http: httpx.Client) -> None:
    """Answered later, or cancelled; and when the engine refuses it, it has failed, and says why."""
    wanted = said(respond(http, domain="a"))
    assert said(settled(http, respond(http, domain="a", background=True).json()["id"])) == wanted
    long = respond(http, domain="a", background=True, max_output_tokens=450, ignore_eos=True).json()["id"]
    cancelled = http.post(f"{RESPONSES}/{long}/cancel")
    assert cancelled.json()["status"] == "cancelled" and memory(cancelled) == USED
    assert settled(http, long).json()["status"] == "cancelled"
    failed = settled(http, respond(http, domain="a", background=True, logit_bias={"99999": 1}).json()["id"]).json()
    assert failed["status"] == "failed" and "99999" in failed["error"]["message"]
    refused(http.post(f"{RESPONSES}/nope/cancel"), 404, "response_id")


def test_streams_of_the_background(http: httpx.Client) -> None:
    """They can be read again, from anywhere; and end, whatever becomes of the request."""
    told = events(respond(http, domain="a", background=True, stream=True))
    response_id = told[0]["response"]["id"]
    again = events(http.get(f"{RESPONSES}/{response_id}", params={"stream": True, "starting_after": 3}))
    assert again == told[4:] and again[-1]["type"] == "response.completed"
    broken = events(respond(http, domain="a", background=True, stream=True, logit_bias={"99999": 1}))
    assert broken[-1]["type"] == "error" and "99999" in broken[-1]["message"]


def test_a_client_that_leaves(server: Server, http: httpx.Client) -> None:
    """Its request ends."""
    with http.stream(
        "POST", RESPONSES, json={**INPUT, "max_output_tokens": 450, "ignore_eos": True, "domain": "a", "stream": True}
    ) as answer:
        next(answer.iter_lines())
    for _ in range(600):
        if metric(http.get("/metrics").text, "vllm:num_requests_running") == 0:
            return
        time.sleep(0.1)
    raise AssertionError("the engine still has it")


def test_a_response_is_its_keys_alone() -> None:
    """Another API key's is as little there as none; without a store the answer says what it takes."""
    stored = {"x": Stored("lab", Selection(None, "none", 0.0))}

    def asked(key: str | None, keeps: bool = True) -> Any:
        serving = SimpleNamespace(enable_store=keeps)
        state = SimpleNamespace(stored_responses=stored, openai_serving_responses=serving)
        return SimpleNamespace(app=SimpleNamespace(state=state), state=SimpleNamespace(key=SimpleNamespace(name=key) if key else None))

    assert _find("x", asked("lab")) is stored["x"]
    for key in ("visitor", None):
        with pytest.raises(UnknownResponse):
            _find("x", asked(key))
    with pytest.raises(UnknownResponse, match="VLLM_ENABLE_RESPONSES_API_STORE"):
        _find("y", asked("lab", keeps=False))


def test_counted(http: httpx.Client) -> None:
    """In the metrics, by mode and domain."""
    before = metric(http.get("/metrics").text, "memdec_requests_total", domain="a", mode="decoder", status="200")
    respond(http, domain="a")
    assert metric(http.get("/metrics").text, "memdec_requests_total", domain="a", mode="decoder", status="200") == before + 1


@pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions/batch", "/v1/messages", "/v1/embeddings"])
def test_paths_that_are_named_as_absent(http: httpx.Client, path: str) -> None:
    """A 404 that says where to go."""
    assert f"{path} is not served here. " in refused(http.post(path, json=INPUT), 404)
    assert {**absent.UNMIXED, **absent.NEVER}[path]


def test_tokenizer_info(http: httpx.Client) -> None:
    """vLLM's, where its flag is given: what lm_eval's remote tokenizer reads."""
    found = http.get("/tokenizer_info").json()
    assert found["eos_token"] == found["bos_token"] == "<|endoftext|>" and "messages" in found["chat_template"]
