"""What one greedy client costs another: a server with two API keys, one of which asks for all that it may.

    memdec serve BASE --decoder … --api-key-file FILE         # two keys, say sk-greedy and sk-small
    python loadtest/neighbours.py http://127.0.0.1:8000 --greedy sk-greedy --small sk-small [--domain NAME]

For each attack the small client asks alone, beside it and after it; a row gives the ratio of the medians, the longest wait, and the slowest `/health`
meanwhile. Only on a loopback address, bounded in count and time. Prints a table and ends with one JSON line.
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import httpx
from attacks import require_loopback

ASKED = 10  # small requests alone, and after each attack
PAUSE = 0.05  # seconds between two small requests
LONGEST = 60.0  # seconds that an attack may take
SMALL = {"prompt": "def read(self):", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
GUIDED = {**SMALL, "max_tokens": 8, "ignore_eos": False, "structured_outputs": {"regex": "[a-z]+zz"}}
LARGE = {"max_tokens": 100, "temperature": 1, "ignore_eos": True}
LONG = [f"def read(self, x{number}):" + " return" * 100 for number in range(64)]


def bombs() -> list[dict[str, Any]]:
    """Forty grammars, of ten kinds, that are small to write and large to compile."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    kinds: list[dict[str, Any]] = [
        {"grammar": 'root ::= ("a" | "b"){1,100000}'},
        {"grammar": 'root ::= (("a"{1,99}){1,99}){1,99}'},
        {"regex": "(a|b){1,100000}"},
        {"regex": "((((a{1,99}){1,99}){1,99}){1,99})"},
        {"choice": [f"choice {number}" for number in range(100_000)]},
        {"choice": ["a" * 900_000, "b" * 900_000]},
        {"json": {"type": "string", "pattern": "(a|b){1,100000}"}},
        {"json": {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": "(ab|ba){1,900}"} for n in range(200)}}},
        {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 200}}, "$ref": "#/$defs/a"}},
        {"json": deep},
    ]
    return kinds * 4


def attacks() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Name -> the requests that the greedy client sends at once."""
    completions, chats = "/v1/completions", "/v1/chat/completions"
    message = {"messages": [{"role": "user", "content": "hi"}]}
    return {
        "128 choices": [(completions, {"prompt": "def f(", "n": 128, "logprobs": 20, **LARGE})],
        "64 prompts with echo": [(completions, {"prompt": LONG, "max_tokens": 1, "echo": True, "logprobs": 20})],
        "a chat of 128 choices": [(chats, {**message, "n": 128, "logprobs": True, "top_logprobs": 20, **LARGE})],
        "40 grammars": [(completions, {**SMALL, "structured_outputs": bomb}) for bomb in bombs()],
    }


class Client:
    """One key's requests."""

    def __init__(self, http: httpx.AsyncClient, key: str, model: str, domain: str | None) -> None:
        self.http, self.headers = http, {"Authorization": f"Bearer {key}"}
        self.more: dict[str, Any] = {"model": model, **({"domain": domain} if domain else {})}

    async def seconds(self, path: str, body: dict[str, Any]) -> float:
        """How long an answer takes. Raises httpx.HTTPStatusError unless it is a success."""
        began = time.perf_counter()
        (await self.http.post(path, json={**self.more, **body}, headers=self.headers)).raise_for_status()
        return time.perf_counter() - began

    async def status(self, path: str, body: dict[str, Any]) -> int:
        """An answer's status; 0: none came."""
        try:
            return (await self.http.post(path, json={**self.more, **body}, headers=self.headers)).status_code
        except httpx.HTTPError:
            return 0


async def measured(http: httpx.AsyncClient, greedy: Client, small: Client, name: str) -> dict[str, Any]:
    """One attack, as the small client and `/health` see it."""
    body = GUIDED if name == "40 grammars" else SMALL
    around = [await small.seconds("/v1/completions", body) for _ in range(ASKED + 2)][2:]
    attack = asyncio.gather(*(greedy.status(path, request) for path, request in attacks()[name]))
    await asyncio.sleep(0.3)
    began, beside, health = time.perf_counter(), [], []
    while not attack.done() and time.perf_counter() - began < LONGEST:
        beside.append(await small.seconds("/v1/completions", body))
        at = time.perf_counter()
        (await http.get("/health")).raise_for_status()
        health.append(time.perf_counter() - at)
        await asyncio.sleep(PAUSE)
    attack.cancel()
    took = time.perf_counter() - began
    around += [await small.seconds("/v1/completions", body) for _ in range(ASKED)]
    alone = statistics.median(around)
    return {
        "attack": name, "seconds": round(took, 1), "asked": len(beside), "alone_ms": round(1000 * alone, 1),
        "ratio": round(statistics.median(beside) / alone, 2), "worst_s": round(max(beside), 2),
        "health_median_s": round(statistics.median(health), 3), "health_worst_s": round(max(health), 2),
    }  # fmt: skip


async def main() -> None:
    """All attacks, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--greedy", required=True, metavar="KEY")
    parser.add_argument("--small", required=True, metavar="KEY")
    parser.add_argument("--domain", help="the domain that both ask for; none: the base")
    parser.add_argument("--only", nargs="*", choices=list(attacks()))
    args = parser.parse_args()
    require_loopback(args.url)
    rows = []
    async with httpx.AsyncClient(base_url=args.url, timeout=10 * LONGEST, limits=httpx.Limits(max_connections=200)) as http:
        listed = await http.get("/v1/models", headers={"Authorization": f"Bearer {args.small}"})
        model = listed.json()["data"][0]["id"]
        greedy, small = (Client(http, key, model, args.domain) for key in (args.greedy, args.small))
        print("| attack | s | small requests | alone, ms | beside ÷ alone | worst, s | /health median, s | worst, s |")
        print("|---|---|---|---|---|---|---|---|")
        for name in args.only or attacks():
            row = await measured(http, greedy, small, name)
            rows.append(row)
            print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    print(json.dumps({"benchmark": "neighbours", "domain": args.domain, "rows": rows}))


if __name__ == "__main__":
    asyncio.run(main())
