"""A hundred requests at once over domains, lambdas and modes: each gets the answer that it gets alone."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asking import COMPLETIONS, PROMPT

pytestmark = pytest.mark.engine

PROMPTS = (PROMPT, "import os\n", "class Reader:\n    def __init__(self, path):\n", "x " * 90)
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    *({"domain": domain, "lambda": lam} for domain in "ab" for lam in (0, 0.3, 0.6, 1)),
    {"domain": "a", "memory": "knn"},
    {"domain": "a", "memory": "knn", "lambda": 0.9},
    {"domain": "a", "memory": "rag"},
    {"domain": "b", "memory": "none"},
)
KINDS = [{"prompt": prompt, **choice} for prompt in PROMPTS for choice in CHOICES]


def test_a_hundred_at_once(http: httpx.Client) -> None:
    """Greedy, token by token, with log-probabilities as near as sums in another order are; half of them twice in one request, whose choices have turns of their own."""

    def asked(kind: dict[str, Any], times: int = 1) -> list[dict[str, Any]]:
        body = {
            "model": "base",
            "max_tokens": 10,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            **kind,
            "prompt": [kind["prompt"]] * times,
        }
        answer = http.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        return [choice["logprobs"] for choice in answer.json()["choices"]]

    alone = [asked(kind)[0] for kind in KINDS]
    order = [i % len(KINDS) for i in range(100)]
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda job: asked(KINDS[job[1]], 1 + job[0] % 2), enumerate(order)))
    for kind, choices in zip(order, found, strict=True):
        for choice in choices:
            assert choice["tokens"] == alone[kind]["tokens"], KINDS[kind]
            gaps = [abs(a - b) for a, b in zip(choice["token_logprobs"], alone[kind]["token_logprobs"], strict=True)]
            assert max(gaps) < 1e-3, KINDS[kind]
