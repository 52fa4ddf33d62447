"""Requests don't feel each other: not in one batch, and not by way of the prefix cache."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import pytest
from asking import ask, text

pytestmark = pytest.mark.engine


def test_concurrent_requests(http: httpx.Client) -> None:
    """24 at once, of several domains, lambdas and lengths, each get the text they get alone."""
    choices: list[dict[str, Any]] = [{"domain": d, "lam": lam} for d, lam in product("ab", (0, 0.3, 0.6, 1))]
    choices += [{}] * 4
    wanted = [{**c, "prompt": f"{'import os  ' * (i % 5)}class Reader{i}:", "max_tokens": 12 + i % 7} for i, c in enumerate(choices * 2)]
    alone = [text(ask(http, **w)) for w in wanted]
    assert len(set(alone)) > 12
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda w: text(ask(http, **w)), wanted))
    assert together == alone and len(wanted) == 24


def prompt(salt: int) -> list[int]:
    """300 token ids, more than two cache blocks on CPU (128 each), that no other test sends."""
    return [100 + (salt * 131 + i * i * 7 + i * salt) % 900 for i in range(300)]


def cached(http: httpx.Client, salt: int, **fields: Any) -> int:
    """How many tokens of the prompt came from the cache."""
    answer = ask(http, prompt=prompt(salt), max_tokens=2, **fields)
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"]["prompt_tokens_details"] or {}
    return int(details.get("cached_tokens") or 0)


def test_prefix_cache_by_domain(http: httpx.Client) -> None:
    """A domain reads what it wrote itself, under any way to choose it and any lambda; nobody else does."""
    assert cached(http, 1, domain="a") == 0
    assert cached(http, 1, domain="a") == cached(http, 1, model="base:a") == cached(http, 1, domain="a", lam=0.2) > 0
    assert cached(http, 1, domain="b") == 0
    assert cached(http, 1) == 0
    assert cached(http, 1) == cached(http, 1, domain="b") > 0


def test_switched_off_shares_the_base_blocks(http: httpx.Client) -> None:
    """Lambda 0 and memory none are the base, in the cache too."""
    assert cached(http, 2) == 0
    assert cached(http, 2, domain="a", lam=0) == cached(http, 2, domain="b", memory="none") > 0
    assert cached(http, 2, domain="a") == 0


def test_cached_answers_are_the_same(http: httpx.Client) -> None:
    """A prompt from the cache gives the text that it gave when it was computed."""
    first, second = (ask(http, prompt=prompt(3), domain="a") for _ in range(2))
    assert text(first) == text(second)
    assert text(first) != text(ask(http, prompt=prompt(3), domain="b"))


def test_salts(http: httpx.Client) -> None:
    """A client's salt is its own room, within its domain; none opens another domain's."""
    revision = http.get("/v1/domains/a").json()["revision"]
    forged = [f"domain:a:{revision}:", f"domain:a:{revision}", "a", "base:", f"domain:a:{revision}:mine"]
    assert cached(http, 4, domain="a") == cached(http, 4, domain="a", cache_salt="mine") == 0
    assert [cached(http, 4, cache_salt=salt) for salt in forged] == [0] * len(forged)
    assert [cached(http, 4, cache_salt=salt, domain="b") for salt in forged] == [0] * len(forged)
    assert cached(http, 4, domain="a", cache_salt="mine") > 0 and cached(http, 4, cache_salt="base:") > 0
    assert cached(http, 4) == 0
