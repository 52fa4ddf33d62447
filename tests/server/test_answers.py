"""What vLLM's OpenAI layer gets wrong in answers, on a server that drafts: plain, streamed and echoed, one choice and several, with a domain and without."""

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import httpx
import pytest
from asking import ask, chat, refused, text
from openai import OpenAI

pytestmark = pytest.mark.engine

DOMAINS = pytest.mark.parametrize("domain", [{}, {"domain": "a"}])
CONTEXT = [5 + 7 * i % 900 for i in range(512)]
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
LISTS = ("tokens", "token_logprobs", "text_offset", "top_logprobs")


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events, none of them an error."""
    assert response.status_code == 200, response.text
    found = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert not [event for event in found if "error" in event]
    return found


def choices(response: httpx.Response) -> list[dict[str, Any]]:
    """An answer's choices; a stream's put together."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        assert response.status_code == 200, response.text
        return [{**c, "logprobs": c["logprobs"] or {}} for c in response.json()["choices"]]
    whole: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "logprobs": defaultdict(list), "token_ids": []})
    for part in (c for event in events(response) for c in event["choices"]):
        one = whole[part["index"]]
        one["text"] += part["text"]
        one["token_ids"] += part["token_ids"] or []
        one["finish_reason"] = part["finish_reason"]
        for name, values in (part["logprobs"] or {}).items():
            one["logprobs"][name] += values
    return [whole[index] for index in sorted(whole)]


@DOMAINS
@pytest.mark.parametrize("prompt", ["The results show that", ["The results show that", "import os"]])
def test_every_choice_has_the_prompts_scores(http: httpx.Client, domain: dict[str, Any], prompt: Any) -> None:
    """Echo, log-probabilities and several choices: streamed as plain, again and again."""
    wanted: dict[str, Any] = {**domain, "prompt": prompt, "n": 2, "echo": True, "logprobs": 2, "max_tokens": 4, "seed": 1, "temperature": 1}
    plain = choices(ask(http, **wanted))
    for _ in range(2):
        for one, streamed in zip(plain, choices(ask(http, **wanted, stream=True)), strict=True):
            assert streamed["text"] == one["text"] and all(streamed["logprobs"][n] == one["logprobs"][n] for n in ("tokens", "text_offset"))
            assert streamed["logprobs"]["token_logprobs"][1:] == pytest.approx(one["logprobs"]["token_logprobs"][1:], abs=1e-4)


@pytest.mark.parametrize("shape", [{}, {"stream": True}, {"echo": True}, {"stream": True, "echo": True}, {"echo": True, "max_tokens": 0}])
@DOMAINS
def test_all_candidates_have_names(http: httpx.Client, domain: dict[str, Any], shape: dict[str, Any]) -> None:
    """K of them, and the chosen one with its own value, also where several are parts of characters."""
    wanted: dict[str, Any] = {"prompt": "日本語 é", "logprobs": 20, "max_tokens": 6, "temperature": 1, "seed": 3, "ignore_eos": True}
    scores = choices(ask(http, **{**wanted, **domain, **shape}))[0]["logprobs"]
    spelled = 0
    for token, chosen, offered in list(zip(*(scores[name] for name in LISTS[:2]), scores["top_logprobs"], strict=True))[
        shape.get("echo", 0) :
    ]:
        assert offered[token] == chosen and len(offered) in (20, 21)
        spelled += sum(name.startswith("bytes:") for name in offered)
    assert spelled


@DOMAINS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["def read(self):", [501, 575, 11]])
def test_a_scored_prompt_is_all_there_is(http: httpx.Client, domain: dict[str, Any], stream: bool, prompt: Any) -> None:
    """No token generated, shown or billed; the echo stays with return_token_ids, also before an answer."""
    wanted: dict[str, Any] = {**domain, "prompt": prompt, "echo": True, "return_token_ids": True, "logprobs": 1, "stop": ["a"]}
    answer = ask(http, **wanted, max_tokens=0, **(USAGE if stream else {}))
    usage = (events(answer)[-1] if stream else answer.json())["usage"]
    (found,) = choices(answer)
    echoed = prompt if isinstance(prompt, str) else http.post("/detokenize", json={"model": "base", "tokens": prompt}).json()["prompt"]
    assert (found["text"], found["token_ids"], found["finish_reason"]) == (echoed, [], "length")
    assert usage["completion_tokens"] == 0 and usage["total_tokens"] == usage["prompt_tokens"] == len(found["logprobs"]["tokens"])
    more = {**wanted, "stop": None, "max_tokens": 2, "stream": stream}
    (longer,), (unseen,) = choices(ask(http, **more)), choices(ask(http, **{**more, "return_token_ids": False}))
    assert longer["text"] == unseen["text"] and longer["text"].startswith(echoed) and len(longer["token_ids"]) == 2


@pytest.mark.parametrize("domain", [{}, {"domain": "a"}, {"domain": "a", "memory": "knn"}, {"domain": "a", "memory": "rag"}])
def test_a_prompt_of_exactly_the_context_is_scored(http: httpx.Client, domain: dict[str, Any]) -> None:
    """As the next shorter one, and its last token as the one that would come."""
    wanted: dict[str, Any] = {
        **domain,
        "echo": True,
        "max_tokens": 0,
        "logprobs": 3,
        "n": 2,
        "temperature": 1,
        "return_tokens_as_token_ids": True,
    }
    shorter = choices(ask(http, **wanted, prompt=CONTEXT[:-1]))[0]["logprobs"]["token_logprobs"]
    next_one = ask(http, **domain, prompt=CONTEXT[:-1], logprobs=3, max_tokens=1).json()["choices"][0]["logprobs"]
    for stream in (False, True):
        answer = ask(http, **wanted, prompt=CONTEXT, stream=stream, stream_options=USAGE["stream_options"] if stream else None)
        assert (events(answer)[-1] if stream else answer.json())["usage"]["total_tokens"] == 512
        for one in choices(answer):
            assert one["text"] and one["finish_reason"] == "length" and len(one["logprobs"]["tokens"]) == 512
            assert one["logprobs"]["token_logprobs"][1:-1] == pytest.approx(shorter[1:], abs=1e-4)
            last, best = one["logprobs"]["top_logprobs"][-1], next_one["top_logprobs"][0]
            assert sorted(last.values())[-3:] == pytest.approx(sorted(best.values())[-3:], abs=1e-4)
            assert last[f"token_id:{CONTEXT[-1]}"] == one["logprobs"]["token_logprobs"][-1] <= max(best.values()) + 1e-4
    assert text(ask(http, **domain, prompt=CONTEXT, echo=True, max_tokens=0))


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 16}, {"max_tokens": None}, {"stream": True}, {"echo": True}, {"domain": "a"}])
def test_a_prompt_without_room_gets_the_contexts_message(http: httpx.Client, fields: dict[str, Any]) -> None:
    """That of one token more."""
    for prompt in (CONTEXT, [*CONTEXT, 5]):
        message = refused(ask(http, **{"prompt": prompt, **fields}), 400, "input_tokens")
        assert (
            f"maximum context length is 512 tokens. However, your prompt contains {'at least ' * (len(prompt) > 512)}{len(prompt)}"
            in message
        )
    assert "max_tokens must be at least 1" in refused(ask(http, prompt=CONTEXT, max_tokens=0), 400, "max_tokens")


def test_a_chat_without_room_gets_the_contexts_message(http: httpx.Client) -> None:
    """The same, by way of the template."""
    plain = chat(http, messages=[{"role": "user", "content": "x"}], max_tokens=1).json()["usage"]["prompt_tokens"]
    two = chat(http, messages=[{"role": "user", "content": "x 7"}], max_tokens=1).json()["usage"]["prompt_tokens"]
    full = [{"role": "user", "content": "x" + " 7" * ((512 - plain) // (two - plain))}]
    for fields in ({}, {"max_tokens": None}, {"stream": True}, {"max_completion_tokens": 4}, {"domain": "a", "memory": "rag"}):
        assert "maximum context length is 512 tokens" in refused(chat(http, messages=full, **fields), 400, "input_tokens")


def test_a_response_without_room_gets_the_contexts_message(http: httpx.Client) -> None:
    """Of exactly the context as of more."""
    lengths = [http.post("/v1/responses", json={"model": "base", "input": i, "max_output_tokens": 1}).json()["usage"] for i in ("x", "x 7")]
    plain, two = (usage["input_tokens"] for usage in lengths)
    count = (512 - plain) // (two - plain)
    for more in (0, 1):
        for fields in ({}, {"max_output_tokens": 16}, {"stream": True}, {"background": True}, {"domain": "a", "memory": "rag"}):
            answer = http.post("/v1/responses", json={"model": "base", "input": "x" + " 7" * (count + more), **fields})
            assert "maximum context length is 512 tokens" in refused(answer, 400, "input_tokens")


@pytest.mark.parametrize("shape", [{"n": 2, "temperature": 1}, {"rag_stride": 2}])
def test_usage_of_each_choice(http: httpx.Client, shape: dict[str, Any]) -> None:
    """In mode `rag` every choice counts its own prompt's passages, at every event; the sum has each prompt once."""

    def counted(prompt: Any) -> tuple[list[int], int]:
        *parts, last = events(ask(http, domain="a", memory="rag", prompt=prompt, ignore_eos=True, **shape, **USAGE))
        of = {part["choices"][0]["index"]: part["usage"]["prompt_tokens"] for part in parts}
        return [of[index] for index in sorted(of)], last["usage"]["prompt_tokens"]

    prompts = ["def read(self):\n    return x", "import os"]
    (one, first), (two, second), (both, total) = counted(prompts[0]), counted(prompts[1]), counted(prompts)
    assert set(one) == {first} and set(two) == {second} and both == [*one, *two] and total == first + second
    plain = ask(http, domain="a", memory="rag", prompt=prompts, ignore_eos=True, **shape)
    assert plain.json()["usage"]["prompt_tokens"] == total


@pytest.mark.parametrize("domain", [{}, {"domain": "a"}, {"domain": "a", "memory": "rag"}])
@pytest.mark.parametrize("shape", [{}, {"stream": True}, {"echo": True}, {"stream": True, "echo": True}])
def test_offsets_are_the_texts(http: httpx.Client, domain: dict[str, Any], shape: dict[str, Any]) -> None:
    """Whatever the tokens are called, and where bytes come that make no character."""
    wanted: dict[str, Any] = {
        **domain,
        **shape,
        "prompt": "def réad(日):",
        "n": 2,
        "logprobs": 0,
        "temperature": 1.5,
        "seed": 5,
        "max_tokens": 12,
        "ignore_eos": True,
    }
    named = choices(ask(http, **wanted))
    for one, numbered in zip(named, choices(ask(http, **wanted, return_tokens_as_token_ids=True)), strict=True):
        scores = one["logprobs"]
        assert numbered["text"] == one["text"] and numbered["logprobs"]["text_offset"] == scores["text_offset"]
        assert all(name.startswith("token_id:") for name in numbered["logprobs"]["tokens"])
        assert scores["text_offset"][0] == 0 and all(a <= b for a, b in pairwise(scores["text_offset"]))
        for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
            assert one["text"].startswith(token, offset) or "\ufffd" in token or token.startswith(("<|", "bytes:"))


@DOMAINS
@pytest.mark.parametrize("stream", [False, True])
def test_bytes_in_chats_are_the_text(http: httpx.Client, domain: dict[str, Any], stream: bool) -> None:
    """Each token's own, parts of characters included, whatever the tokens are called."""
    wanted: dict[str, Any] = {
        "temperature": 1.5,
        "seed": 2,
        "max_tokens": 16,
        "logprobs": True,
        "top_logprobs": 4,
        "logit_bias": {"0": -100},
    }
    for named in ({}, {"return_tokens_as_token_ids": True}):
        answer = chat(http, **wanted, **domain, **named, stream=stream)
        parts = [c for event in (events(answer) if stream else [answer.json()]) for c in event["choices"]]
        said = "".join(c["delta"].get("content") or "" if stream else c["message"]["content"] for c in parts)
        tokens = [t for c in parts for t in (c["logprobs"] or {}).get("content", [])]
        joined = b"".join(bytes(t["bytes"]) for t in tokens)
        assert len(tokens) == 16 and all(t["bytes"] for t in tokens) and all(o["bytes"] for t in tokens for o in t["top_logprobs"])
        for special in ("<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"):
            joined = joined.replace(special.encode(), b"")
        assert joined.decode("utf-8", "replace").rstrip("\ufffd") == said.rstrip("\ufffd")


@DOMAINS
@pytest.mark.parametrize("stream", [False, True])
def test_bytes_in_responses_are_the_text(http: httpx.Client, domain: dict[str, Any], stream: bool) -> None:
    """The same of /v1/responses; a token without text, such as the first part of a character, is told with the next."""
    told = {"include": ["message.output_text.logprobs"], "top_logprobs": 4, "stream": stream}
    for seed in range(3):
        wanted = {"input": "hi", "temperature": 1.5, "seed": seed, "max_output_tokens": 24, "logit_bias": {"0": -100}, **domain, **told}
        answer = http.post("/v1/responses", json={"model": "base", **wanted})
        assert answer.status_code == 200, answer.text
        found = events(answer)[-1]["response"] if stream else answer.json()
        ((part,),) = (item["content"] for item in found["output"])
        joined = b"".join(bytes(t["bytes"]) for t in part["logprobs"])
        told_tokens = [one for token in part["logprobs"] for one in (token, *token["top_logprobs"])]
        assert all(one["bytes"] or not one["token"] for one in told_tokens), "but rows of the model beyond the vocabulary have none"
        if stream:
            count = [len(event["logprobs"]) for event in events(answer) if event["type"] == "response.output_text.delta"]
            assert sum(count) == len(part["logprobs"])
        for special in ("<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"):
            joined = joined.replace(special.encode(), b"")
        assert joined.decode("utf-8", "replace").rstrip("\ufffd") == part["text"].rstrip("\ufffd")


@DOMAINS
@pytest.mark.parametrize(
    "fields", [{}, {"stop": ["e"]}, {"return_token_ids": True, "logprobs": 1}, {"echo": True, "max_tokens": 0}, {"n": 2, "temperature": 1}]
)
def test_the_reason_comes_after_the_text(http: httpx.Client, domain: dict[str, Any], fields: dict[str, Any]) -> None:
    """Every choice's last event has the reason and nothing else, and is the only one with a reason; what came before is the plain text."""
    wanted: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, **domain, **fields}
    for asked, path in ((ask, "text"), (chat, "delta")):
        if asked is chat and ("echo" in fields or "logprobs" in fields):
            continue
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for event in events(asked(http, **wanted, stream=True)):
            found[event["choices"][0]["index"]].append(event["choices"][0])
        for parts in found.values():
            *before, last = parts
            assert last["finish_reason"] and not last[path] and not any((last["logprobs"] or {}).values()) and not last.get("token_ids")
            assert before and not any(part["finish_reason"] for part in before)


@DOMAINS
@pytest.mark.parametrize("asked", [ask, chat])
def test_one_event_a_token(http: httpx.Client, domain: dict[str, Any], asked: Any) -> None:
    """On request, also where drafts give several a step: each event has its piece of the text, and they add up."""
    wanted: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "return_token_ids": True, "stream": True, **domain}
    found = events(asked(http, **wanted, stream_options={"one_event_per_token": True}))
    plain = events(asked(http, **wanted))

    def said(parts: list[dict[str, Any]]) -> str:
        return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for part in parts for c in part["choices"])

    counts = [len(part["choices"][0].get("token_ids") or []) for part in found]
    assert sum(counts) == 16 and max(counts) == 1 and said(found) == said(plain)
    refused(asked(http, stream=True, stream_options={"one_event_per_token": 3}), 400, "stream_options")


def test_with_the_sdk(sdk: OpenAI) -> None:
    """A scorer's request and a stream that ends at its reason, as the SDK reads them."""
    scored = sdk.completions.create(model="base:a", prompt="def read(self):", max_tokens=0, echo=True, logprobs=5)
    assert scored.usage is not None and scored.usage.completion_tokens == 0 and scored.choices[0].text == "def read(self):"
    scores = scored.choices[0].logprobs
    assert scores is not None and scores.tokens and scores.top_logprobs and len(scores.top_logprobs[-1]) >= 5
    said, wanted = "", {"model": "base:a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    for chunk in sdk.chat.completions.create(**wanted, stream=True):  # type: ignore[call-overload]
        if chunk.choices[0].finish_reason:
            break
        said += chunk.choices[0].delta.content or ""
    assert said == sdk.chat.completions.create(**wanted).choices[0].message.content  # type: ignore[call-overload]
