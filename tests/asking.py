"""Short ways to ask the toy server something, and to look at what comes back."""

from typing import Any

import httpx

PROMPT = "def read(self):"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE = {"model": "base", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
ABSENT = object()


def ask(http: httpx.Client, headers: dict[str, str] | None = None, lam: Any = ABSENT, **fields: Any) -> httpx.Response:
    """A greedy completion; `fields` change or add to its body, `lam` is the field that Python can't name."""
    chosen = {} if lam is ABSENT else {"lambda": lam}
    return http.post(COMPLETIONS, json={**BASE, **fields, **chosen}, headers=headers)


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    """A greedy chat completion."""
    body = {"model": "base", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8, "temperature": 0}
    return http.post(CHAT, json={**body, **fields})


def text(response: httpx.Response) -> str:
    """The first choice's text of an answer that must be a success."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def memory(response: httpx.Response) -> dict[str, str]:
    """The response headers that say what was used."""
    return {name.removeprefix("x-memory-"): value for name, value in response.headers.items() if name.startswith("x-memory-")}


def refused(response: httpx.Response, status: int, param: str | object | None = ABSENT) -> str:
    """Check that an answer is an error in OpenAI's form, a short one; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["type"], str) and error["type"]
    assert isinstance(error["message"], str) and 0 < len(error["message"]) < 2000
    if param is not ABSENT:
        assert error["param"] == param, error
    return str(error["message"])
