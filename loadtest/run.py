"""`make loadtest`: start a server, load it with locust, and write the measurements to loadtest/results/.

Two parts, each against a fresh server: a mix of all modes and domains arriving as a Poisson process, and one mode at a time at concurrency 1 to 32.
Writes results.json, report.md, latency.png, concurrency.png and locust's CSV files; prints one JSON line last.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODES = ("none", "decoder", "ngram", "knn", "rag")
FIRST, NEXT = "time to first token", "inter-token latency"


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="length of the mixed part")
    parser.add_argument("--step-seconds", type=int, default=10, help="length of each step of the sweep")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--arrivals", type=float, default=1.0, help="requests a second and user in the mixed part")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--out", type=Path, default=ROOT / "loadtest" / "results")
    parser.add_argument("serve", nargs=argparse.REMAINDER, help="-- and what `memdec serve` is to be started with")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    command = [word for word in args.serve if word != "--"]
    with server(command, args.out) as url:
        mixed = run(url, args.out / "mixed", args.users, args.seconds, "--arrivals", str(args.arrivals))
    with server(command, args.out) as url:
        sweep = [
            {"mode": mode, "users": users, **run(url, args.out / f"{mode}-{users}", users, args.step_seconds, "--modes", mode, keep=False)}
            for users in args.concurrency
            for mode in MODES
        ]
    results = {
        "hardware": {"machine": platform.machine(), "processor": cpu(), "cores": os.cpu_count()},
        "commit": commit(),
        "command": " ".join(["python loadtest/run.py", *sys.argv[1:]]),
        "mixed": mixed,
        "sweep": sweep,
    }
    kept = results | {
        "mixed": {k: v for k, v in mixed.items() if k != "samples"},
        "sweep": [{k: v for k, v in s.items() if k != "samples"} for s in sweep],
    }
    (args.out / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    (args.out / "samples.json").write_text(json.dumps(mixed["samples"]) + "\n")
    plot(results, args.out)
    text = report(results)
    (args.out / "report.md").write_text(text)
    print(text)
    line = {f"{mode}_{what}": value for mode in MODES for what, value in ratios(mixed, mode).items()}
    print(json.dumps({"benchmark": "loadtest", "commit": results["commit"], "ratio_to_base": line, "agreement": mixed["agreement"]}))


@contextlib.contextmanager
def server(command: list[str], out: Path) -> Iterator[str]:
    """Run `memdec serve` with these arguments on a free port; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (out / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "memdec", "serve", *command, "--port", str(port), "--disable-uvicorn-access-log"],
        cwd=ROOT,
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 300
        while "memdec is ready" not in (out / "server.log").read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start; see {out / 'server.log'}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


def run(url: str, prefix: Path, users: int, seconds: int, *options: str, keep: bool = True) -> dict[str, Any]:
    """One headless locust run: latencies by mode and domain, throughput, failures, and what /metrics says of the same time."""
    samples = prefix.with_suffix(".samples.json")
    before = scrape(url)
    subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--host", url, "--headless", "-u", str(users), "-r", str(users),
         "-t", f"{seconds}s", "--stop-timeout", "30", "--csv", str(prefix), "--samples", str(samples), "--only-summary", "--exit-code-on-error", "0", *options],
        check=True, capture_output=not keep, timeout=seconds + 120,
    )  # fmt: skip
    time.sleep(1)
    after = scrape(url)
    seen: dict[str, list[float]] = json.loads(samples.read_text())
    samples.unlink()
    failures = failed_requests(prefix)
    if not keep:
        for file in prefix.parent.glob(f"{prefix.name}_*.csv"):
            file.unlink()
    tokens = total(after, "memdec_generated_tokens_total") - total(before, "memdec_generated_tokens_total")
    return {
        "latency_ms": {name: summary(values) for name, values in sorted(seen.items())},
        "samples": dict(sorted(seen.items())) if keep else {},
        "tokens_per_second": round(tokens / seconds, 1),
        "failures": failures,
        "agreement": agreement(seen, before, after),
    }


def failed_requests(prefix: Path) -> int:
    """Failed requests: of the aggregated row, the last of locust's statistics."""
    lines = prefix.with_name(f"{prefix.name}_stats.csv").read_text().splitlines()
    names = lines[0].split(",")
    return int(lines[-1].split(",")[names.index("Failure Count")])


def summary(values: list[float]) -> dict[str, float]:
    """Count, mean and percentiles of milliseconds."""
    ordered = sorted(values)
    at = {p: ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (50, 95, 99)}
    return {"count": len(values), "mean": round(statistics.fmean(values), 3), **{f"p{p}": round(v, 3) for p, v in at.items()}}


def agreement(seen: dict[str, list[float]], before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Mean inter-token latency that clients saw over the one in /metrics, by mode and domain: streamed requests alone are seen by both sides."""
    quotients = {}
    for name, values in seen.items():
        mode, domain, what = name.split(" ", 2)
        labels = f'domain="{domain}",mode="{mode}"'
        count, seconds = (
            after.get(f"memdec_inter_token_latency_seconds_{x}{{{labels}}}", 0)
            - before.get(f"memdec_inter_token_latency_seconds_{x}{{{labels}}}", 0)
            for x in ("count", "sum")
        )
        if what == NEXT and count:
            quotients[f"{mode} {domain}"] = round(statistics.fmean(values) / (1000 * seconds / count), 3)
    return quotients


def scrape(url: str) -> dict[str, float]:
    """The metrics page: sample name with labels -> value."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    matches = (re.fullmatch(r"(\S+?(?:\{.*\})?) (\S+)", line) for line in lines if not line.startswith("#"))
    return {m[1]: float(m[2]) for m in matches if m}


def total(page: dict[str, float], name: str) -> float:
    """Sum over a metric's labels."""
    return sum(value for key, value in page.items() if key.split("{")[0] == name)


def pooled(part: dict[str, Any], mode: str, what: str) -> list[float]:
    """Raw latencies of a mode over its domains."""
    return [v for name, values in part["samples"].items() if name.startswith(f"{mode} ") and name.endswith(what) for v in values]


def ratios(mixed: dict[str, Any], mode: str) -> dict[str, float]:
    """p50 and p95 of inter-token latency over the base's, in the mixed run."""
    base, own = (sorted(pooled(mixed, m, NEXT)) for m in ("none", mode))
    if not base or not own:
        return {}
    return {f"p{p}": round(own[int(p / 100 * len(own))] / base[int(p / 100 * len(base))], 3) for p in (50, 95)}


def report(results: dict[str, Any]) -> str:
    """Markdown: what was run where, the mixed part, the sweep, and whether both ends agree."""
    mixed, hardware = results["mixed"], results["hardware"]
    lines = [
        "# Load test", "",
        f"{hardware['processor']}, {hardware['cores']} cores; locust on the same machine. Commit {results['commit']}. `{results['command']}`", "",
        f"## All modes and domains at once, Poisson arrivals: {mixed['tokens_per_second']} tokens/s, {mixed['failures']} failures", "",
        "| mode and domain | what | count | mean ms | p50 | p95 | p99 |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in mixed["latency_ms"].items():
        mode, domain, what = name.split(" ", 2)
        lines.append(
            f"| {mode} {domain} | {what} | {row['count']} | {row['mean']:.1f} | {row['p50']:.1f} | {row['p95']:.1f} | {row['p99']:.1f} |"
        )
    shown = ", ".join(f"{name} {value:.2f}" for name, value in mixed["agreement"].items())
    lines += ["", f"Mean inter-token latency, what locust saw ÷ what /metrics says: {shown}.", "", "## One mode at a time", ""]
    lines += ["| users | " + " | ".join(f"{m}: tokens/s | p95 ms" for m in MODES) + " |", "|---" * (1 + 2 * len(MODES)) + "|"]
    for users in sorted({step["users"] for step in results["sweep"]}):
        cells = []
        for mode in MODES:
            step = next(s for s in results["sweep"] if s["users"] == users and s["mode"] == mode)
            p95 = [row["p95"] for name, row in step["latency_ms"].items() if name.endswith(NEXT)]
            cells.append(f"{step['tokens_per_second']} | {max(p95, default=0):.1f}")
        lines.append(f"| {users} | " + " | ".join(cells) + " |")
    failed = sum(step["failures"] for step in results["sweep"])
    return "\n".join([*lines, "", f"Failures in the sweep: {failed}.", "", "![](latency.png)", "", "![](concurrency.png)", ""])


def plot(results: dict[str, Any], out: Path) -> None:
    """Distribution of inter-token latency by mode; throughput and p95 against concurrency."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for mode in MODES:
        values = sorted(pooled(results["mixed"], mode, NEXT))
        if values:
            axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=mode)
    axes.set(xlabel="inter-token latency, ms", ylabel="share of tokens", title="All modes in one engine, Poisson arrivals")
    axes.set_xlim(0, 1.2 * max(row["p99"] for name, row in results["mixed"]["latency_ms"].items() if name.endswith(NEXT)))
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "latency.png", dpi=120)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for mode in MODES:
        steps = [s for s in results["sweep"] if s["mode"] == mode]
        users = [s["users"] for s in steps]
        left.plot(users, [s["tokens_per_second"] for s in steps], marker="o", label=mode)
        p95 = [max((r["p95"] for n, r in s["latency_ms"].items() if n.endswith(NEXT)), default=0) for s in steps]
        right.plot(users, p95, marker="o", label=mode)
    left.set(xlabel="users", ylabel="tokens per second", xscale="log", title="Throughput (decoder: all domains mixed)")
    right.set(xlabel="users", ylabel="p95 inter-token latency, ms", xscale="log", title="Latency")
    right.set_ylim(0)
    for axes in (left, right):
        axes.set_xticks(users, [str(u) for u in users])
        axes.minorticks_off()
        axes.legend()
    figure.tight_layout()
    figure.savefig(out / "concurrency.png", dpi=120)


def cpu() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def commit() -> str:
    """The checkout's commit."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
