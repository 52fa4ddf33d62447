"""A soak test: hours of mixed load on one server, with clients that disconnect, read slowly or send invalid bodies, to see whether memory stays flat.

    python loadtest/soak.py --minutes 120 -- decoders/zoo/base --decoder python=decoders/zoo/python --dtype float32 --enforce-eager

Every minute a row: requests by outcome, and the resident memory of the server and of each of its processes. Prints one JSON line last.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from run import commit, cpu, server

PROMPTS = ("The results show that", "def read_file(path):", "The court held that", "Net sales increased by", "import os\n\nclass ")
WRONG = (b"{", b'{"prompt": 5}', b'{"prompt": "x", "n": 1e99}', b'{"prompt": "x", "domain": "\\u0000"}', b"[" * 2000, b"\xff\xfe")
TIMEOUT = 300  # seconds without a byte after which a request counts as failed
LENGTHS = 320
WARM = 0.25  # share of the run after which memory should be flat: caches, the KV's pages and the allocator's arenas fill up before


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("/tmp"), help="folder of the server's log (default: %(default)s)")
    parser.add_argument("serve", nargs=argparse.REMAINDER, help="-- and what `memdec serve` is to be started with")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with server([word for word in args.serve if word != "--"], args.out) as url:
        rows = asyncio.run(soak(url, args.minutes * 60, args.clients))
    errors = (args.out / "server.log").read_text(errors="replace").count("Traceback")
    print(json.dumps({"benchmark": "soak", "commit": commit(), "processor": cpu(), **summary(rows), "tracebacks": errors}))


async def soak(url: str, seconds: float, clients: int) -> list[dict[str, Any]]:
    """Load a server, and take a row a minute (more often in a short run)."""
    counts: Counter[str] = Counter()
    every = min(60.0, seconds / 10)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client:
        offered = (await client.get("/v1/domains")).json()["data"]
        modes = [{}, *({"domain": d["name"], "memory": mode} for d in offered for mode in d["modes"])]
        pid = server_pid(url)
        await warm_up(client, modes)
        ends = time.monotonic() + seconds
        users = [asyncio.create_task(use(client, modes, random.Random(number), ends, counts)) for number in range(clients)]
        rows: list[dict[str, Any]] = []
        late = 0.0
        print("| minute | done | left | slow | refused | failed | " + " | ".join(names(pid)) + " |")
        while time.monotonic() < ends:
            due = time.monotonic() + every
            await asyncio.sleep(every)
            late += max(0.0, time.monotonic() - due - 1)
            rows.append({"minute": round((seconds - ends + time.monotonic()) / 60, 1), **dict(counts), "memory": memory(pid)})
            shown = " | ".join(str(counts[k]) for k in ("done", "left", "slow", "refused", "failed"))
            print(
                f"| {rows[-1]['minute']} | {shown} | " + " | ".join(f"{m:.0f} MB" for m in rows[-1]["memory"].values()) + " |", flush=True
            )
        await asyncio.gather(*users)
        rows.append(
            {"minute": round(seconds / 60, 1), **dict(counts), "memory": memory(pid), "stalled": round(late, 1), **await idle(client)}
        )
    return rows


async def warm_up(client: httpx.AsyncClient, modes: list[dict[str, Any]]) -> None:
    """Send a prompt of every length: the engine caches megabytes per step size on a CPU, which would look like a leak."""
    for fields in modes:
        for length in range(1, LENGTHS):
            await client.post("/v1/completions", json={**fields, "prompt": [5 + length % 3] * length, "max_tokens": 1})


async def use(client: httpx.AsyncClient, modes: list[dict[str, Any]], dice: random.Random, ends: float, counts: Counter[str]) -> None:
    """One client: mostly complete requests; some are abandoned, some read slowly, some invalid."""
    while time.monotonic() < ends:
        kind = dice.choices(("stream", "plain", "chat", "leave", "slow", "wrong"), (30, 30, 15, 15, 5, 5))[0]
        fields = {
            **dice.choice(modes),
            "max_tokens": dice.randint(1, 64),
            "temperature": dice.choice((0, 1)),
            "ignore_eos": dice.random() < 0.5,
        }
        text = dice.choice(PROMPTS) + " word" * dice.randint(0, 60)
        try:
            counts[await request(client, kind, fields, text, dice)] += 1
        except Exception as error:
            counts["failed"] += 1
            print(f"failed: {kind} {fields}: {type(error).__name__} {error}", file=sys.stderr, flush=True)


async def request(client: httpx.AsyncClient, kind: str, fields: dict[str, Any], text: str, dice: random.Random) -> str:
    """One request; returns how it ended."""
    if kind == "wrong":
        answer = await client.post("/v1/completions", content=dice.choice(WRONG), headers={"Content-Type": "application/json"})
        return "refused" if 400 <= answer.status_code < 500 else "failed"
    if kind in ("plain", "chat"):
        path, asked = (
            ("/v1/completions", {"prompt": text})
            if kind == "plain"
            else ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]})
        )
        answer = await client.post(path, json={**fields, **asked})
        return "done" if answer.status_code == 200 else "busy" if answer.status_code == 503 else "failed"
    async with client.stream("POST", "/v1/completions", json={**fields, "prompt": text, "stream": True}) as response:
        if response.status_code != 200:
            return "busy" if response.status_code == 503 else "failed"
        last, leaves = "", dice.randint(1, 10) if kind == "leave" else 0
        async with contextlib.aclosing(cast("AsyncGenerator[str]", response.aiter_lines())) as lines:
            async for line in lines:
                last = line or last
                leaves -= 1
                if leaves == 0:
                    return "left"
                if kind == "slow":
                    await asyncio.sleep(0.2)
    return ("slow" if kind == "slow" else "done") if last == "data: [DONE]" else "left" if kind == "leave" else "failed"


async def idle(client: httpx.AsyncClient) -> dict[str, float]:
    """Requests and KV cache that the engine still holds after all clients have gone."""
    await asyncio.sleep(5)
    page = (await client.get("/metrics")).text
    held = {}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        held[name] = sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)", page, re.M))
    return held


def server_pid(url: str) -> int:
    """The process that listens on the URL's port."""
    port = url.rsplit(":", 1)[1]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"serve" in words and port.encode() in words:
                return int(folder.name)
    raise SystemExit(f"no process serves {url}")


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += map(int, task.read_text().split())
    return pids


def names(pid: int) -> list[str]:
    """Column names of the memory table."""
    return [f"process {number}" for number, _ in enumerate(family(pid), 1)]


def memory(pid: int) -> dict[str, float]:
    """Resident megabytes of each process."""
    megabytes = {}
    for number, one in enumerate(family(pid), 1):
        with contextlib.suppress(OSError, IndexError):
            megabytes[f"process {number}"] = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text())[0]) / 1024
    return megabytes


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals, and how much memory grew after the warm-up, by a straight line through its rows."""
    kept = rows[int(WARM * len(rows)) :]
    growth, level = {}, {}
    for name in rows[-1]["memory"]:
        points = [(row["minute"], row["memory"][name]) for row in kept if name in row["memory"]]
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else 0.0
        growth[name], level[name] = round(60 * slope, 1), round(points[-1][1], 1)
    totals = {key: rows[-1].get(key, 0) for key in ("done", "left", "slow", "refused", "busy", "failed")}
    held = {key: value for key, value in rows[-1].items() if key.startswith(("num_", "kv_"))}
    return {
        "minutes": rows[-1]["minute"],
        "requests": totals,
        "seconds_the_machine_stood_still": rows[-1]["stalled"],
        "megabytes_at_end": level,
        "megabytes_an_hour": growth,
        "held_at_end": held,
    }


if __name__ == "__main__":
    main()
