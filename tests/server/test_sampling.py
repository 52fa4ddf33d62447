"""What OpenAI's and vLLM's sampling parameters do with a domain."""

import json
from typing import Any

import httpx
import pytest
from asking import PROMPT, ask, refused, text
from openai import OpenAI

pytestmark = pytest.mark.engine

RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}


def test_seed_and_n(http: httpx.Client) -> None:
    """Three choices with a seed repeat, and differ among themselves; another seed gives others."""
    wanted: dict[str, Any] = {"domain": "a", "n": 3, **RANDOM}
    once, again, other = (ask(http, seed=seed, **wanted).json()["choices"] for seed in (7, 7, 1007))
    assert [c["text"] for c in once] == [c["text"] for c in again] != [c["text"] for c in other]
    assert len({c["text"] for c in once}) == 3 and [c["index"] for c in once] == [0, 1, 2]


def test_same_seed_other_domain(http: httpx.Client) -> None:
    """The seed fixes the noise, not the distribution."""
    assert len({text(ask(http, domain=domain, seed=7, **RANDOM)) for domain in (None, "a", "b")}) == 3


def test_stop(http: httpx.Client) -> None:
    """The text ends before the stop string, or with it when asked."""
    whole = text(ask(http, domain="a", max_tokens=16))
    stop = whole[len(whole) // 2 :][:3]
    answer = ask(http, domain="a", max_tokens=16, stop=[stop, "\0never"])
    assert text(answer) == whole[: whole.index(stop)] and answer.json()["choices"][0]["finish_reason"] == "stop"
    assert text(ask(http, domain="a", max_tokens=16, stop=stop, include_stop_str_in_output=True)) == text(answer) + stop


@pytest.mark.parametrize("lam", [0, 0.4, 1])
@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5, "frequency_penalty": -1.5},
        {"repetition_penalty": 1.3},
        {"top_p": 0.5, "top_k": 5, "min_p": 0.05, "temperature": 0.7, "seed": 1},
        {"min_tokens": 5, "stop_token_ids": [5]},
        {"bad_words": ["read"]},
        {"prompt_logprobs": 2},
    ],
)
def test_parameters_work_with_a_domain(http: httpx.Client, fields: dict[str, Any], lam: float) -> None:
    """None of them fails, at either end of lambda or between."""
    assert ask(http, domain="a", lam=lam, **fields).json()["usage"]["completion_tokens"] > 0


def test_logit_bias(http: httpx.Client) -> None:
    """A bias reaches the mixed distribution."""
    [token] = http.post("/tokenize", json={"model": "base", "prompt": " read"}).json()["tokens"]
    for lam in (0.4, 1):
        assert text(ask(http, domain="a", lam=lam, max_tokens=3, logit_bias={str(token): 100})) == " read" * 3


def test_repetition_penalty_acts(http: httpx.Client) -> None:
    """With only two tokens allowed, a strong penalty makes the model change between them."""
    wanted: dict[str, Any] = {"domain": "a", "max_tokens": 2, "allowed_token_ids": [300, 400], "logprobs": 2}
    penalised = ask(http, **wanted, presence_penalty=2, frequency_penalty=2, repetition_penalty=50.0)
    assert len(set(penalised.json()["choices"][0]["logprobs"]["tokens"])) == 2


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompts", ["strings", "ids"])
def test_echo_with_logprobs(http: httpx.Client, max_tokens: int, prompts: str) -> None:
    """The shape of lm-eval's requests: every prompt token but the first has a log-probability, alone and in a batch."""
    batch: list[Any] = [PROMPT, "class Reader:"]
    ids = [http.post("/tokenize", json={"model": "base", "prompt": p}).json()["tokens"] for p in batch]
    wanted: dict[str, Any] = {"domain": "a", "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    both = ask(http, prompt=batch if prompts == "strings" else ids, **wanted).json()["choices"]
    for prompt, tokens, choice in zip(batch, ids, both, strict=True):
        first, *others = choice["logprobs"]["token_logprobs"]
        assert first is None and all(value < 0 for value in others) and len(others) + 1 == len(tokens) + max_tokens
        assert choice["text"].startswith(prompt) and (choice["text"] == prompt) == (max_tokens == 0)
        alone = ask(http, prompt=prompt, **wanted).json()["choices"][0]
        assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(others, abs=1e-3)
    base = ask(http, prompt=batch, **{**wanted, "domain": None}).json()["choices"]
    assert base[0]["logprobs"]["token_logprobs"] != both[0]["logprobs"]["token_logprobs"]


SCHEMA = {"enum": ["red", "green"]}


@pytest.mark.parametrize("domain", ["a", "b"])
def test_guided_json(http: httpx.Client, sdk: OpenAI, domain: str) -> None:
    """A schema binds the mixed model too: completions, chats, and a choice of strings."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    answer = ask(http, domain=domain, max_tokens=100, response_format=form, seed=3, temperature=1)
    chat = sdk.chat.completions.create(
        model=f"base:{domain}", messages=[{"role": "user", "content": "?"}], max_tokens=100, seed=3, response_format=form
    )
    for written, reason in (
        (text(answer), answer.json()["choices"][0]["finish_reason"]),
        (chat.choices[0].message.content or "", chat.choices[0].finish_reason),
    ):
        assert reason == "stop"
        assert json.loads(written) in SCHEMA["enum"] and written == written.strip()
    assert text(ask(http, domain=domain, max_tokens=20, structured_outputs={"choice": SCHEMA["enum"]})) in SCHEMA["enum"]


def test_beam_search(http: httpx.Client) -> None:
    """Works on the base; with a domain it would silently drop the domain, so it is refused."""
    assert len(ask(http, use_beam_search=True, n=2).json()["choices"]) == 2
    refused(ask(http, use_beam_search=True, n=2, domain="a"), 400, "use_beam_search")


@pytest.mark.parametrize(
    "schema", [{"type": "array", "minItems": 10**9}, {"type": "object", "properties": {"a": {"type": "string", "maxLength": 10**7}}}]
)
@pytest.mark.parametrize("where", ["structured_outputs", "response_format", "text"])
def test_schemas_that_count_too_far_are_refused_at_once(schema: dict[str, Any], where: str, http: httpx.Client) -> None:
    """Compiling such a schema would take the machine's memory."""
    places: dict[str, dict[str, Any]] = {
        "structured_outputs": {"structured_outputs": {"json": schema}},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        "text": {"structured_outputs": {"json": json.dumps(schema)}},
    }
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "domain": "a", **places[where]})
    assert answer.status_code == 400
    assert "at most 10,000" in answer.json()["error"]["message"]


def test_a_schema_in_text_that_nests_too_deeply_is_refused(http: httpx.Client) -> None:
    """The parser's limit is the client's error, not the server's."""
    field: dict[str, Any] = {"structured_outputs": {"json": '{"a":' * 8000 + "1" + "}" * 8000}}
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, **field})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_grammar_that_is_none_is_refused_whatever_came_before(http: httpx.Client) -> None:
    """Front end and engine use the same backend."""
    for _ in range(2):
        answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "structured_outputs": {"grammar": "root ::= "}})
        assert answer.status_code == 400
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "structured_outputs": {"json": {"type": "object"}}})
