"""Write the report from the scores: table.md, results.json, plots."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memdec.decoders.manifest import write_whole
from memdec.decoders.perplexity import Floats, perplexity
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.study.plan import Plan
from memdec.decoders.study.plots import write_plots
from memdec.decoders.study.scores import METHODS, weight_bytes

RESAMPLED = 1000
FREQUENT = 100  # function words: the most frequent tokens of the training text
RARE = 0.1  # share of the scored tokens that counts as the long tail: the rarest that occur in the training text
NAMED = 10
RETRIEVERS = ("knn", "knn_teacher", "decoder")


def write_report(out: Path, plan: Plan, pairs: list[tuple[str, str, Path]], timed: dict[tuple[str, str], dict[str, float]]) -> None:
    """Write everything into `out`. `pairs`: (domain, base, scores folder)."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(next(iter(plan.bases.values())).path)
    rows = [summary(domain, base, folder, timed[domain, base], tokenizer) for domain, base, folder in pairs]
    sizes = {d.name: weight_bytes(d.decoder or d.work / "decoder") for d in plan.domains}
    results = {
        "hardware": f"{platform.processor() or platform.machine()}, threads {torch.get_num_threads()}, torch {torch.__version__}",
        "budget": asdict(plan.budget),
        "bases": {name: {"dapt_tokens": b.dapt_tokens, "lora_tokens": b.lora_tokens} for name, b in plan.bases.items()},
        "decoder_bytes": sizes,
        "results": rows,
        "targets": targets(rows, sizes),
    }
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(out / "table.md", markdown(results))
    write_plots(out, results)


def summary(domain: str, base: str, folder: Path, ms: dict[str, float], tokenizer: Any) -> dict[str, Any]:
    """All figures of one domain beside one base."""
    rows, general, tokens = np.load(folder / "scores.npz"), np.load(folder / "general.npz"), np.load(folder / "tokens.npz")
    figures = json.loads((folder / "figures.json").read_text())
    served, texts = folder / "served.json", folder.parent / f"continuations-{base}" / "continuations.json"
    methods = {}
    for method in (m for m in METHODS if m in rows):
        low, high = interval(rows[method], tokens["documents"])
        methods[method] = {
            "perplexity": round(perplexity(rows[method]), 3),
            "interval": [round(low, 3), round(high, 3)],
            "bytes": figures["bytes"][method],
            "milliseconds": ms[method],
            "general": round(perplexity(general[method]), 3),
            "tuned": {k: v for k, v in figures["tuned"].get(method, {}).items() if k != "tried"},
        }
    return {
        "domain": domain,
        "base": base,
        "scored": len(tokens["labels"]),
        "documents": len(np.unique(tokens["documents"])),
        "methods": methods,
        "long_tail": long_tail(rows, tokens["labels"], tokens["counts"], tokenizer),
        "coherence": coherence(rows, tokens["labels"], tokens["counts"]),
        "stores": figures["store"],
        "recall": figures["recall"],
        "served": json.loads(served.read_text()) if served.is_file() else None,
        "continuations": json.loads(texts.read_text()) if texts.is_file() else [],
    }


def interval(logprobs: Floats, documents: NDArray[np.int64]) -> tuple[float, float]:
    """95 % bootstrap interval of the perplexity, documents resampled."""
    _, owner = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(owner, logprobs), np.bincount(owner)
    picks = np.random.default_rng(0).integers(0, len(counts), (RESAMPLED, len(counts)))
    values = np.exp(-sums[picks].sum(1) / counts[picks].sum(1))
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def long_tail(rows: Any, labels: NDArray[np.int64], counts: NDArray[np.int64], tokenizer: Any) -> dict[str, Any]:
    """Geometric mean of p / p_base on the scored tokens that are rarest in the training text, but occur in it."""
    seen = counts[labels]
    places = np.flatnonzero(seen > 0)
    rarest = places[np.argsort(seen[places], kind="stable")][: int(RARE * len(places))]
    gain = {m: rows[m][rarest] - rows["base"][rarest] for m in RETRIEVERS if m in rows}
    # Examples are spread evenly over the order of gains, so that they are typical.
    order = rarest[np.argsort(gain["decoder"], kind="stable")]
    shown = order[np.linspace(0, len(order) - 1, NAMED + 2).astype(int)[1:-1]]
    named = [
        {
            "token": tokenizer.decode([int(labels[i])]),
            "count": int(seen[i]),
            **{m: float(np.exp(rows[m][i]).round(6)) for m in ("base", *gain)},
        }
        for i in shown
    ]
    return {
        "tokens": len(rarest),
        "at_most": int(seen[rarest].max()),
        "gain": {m: round(float(np.exp(g.mean())), 3) for m, g in gain.items()},
        "named": named,
    }


def coherence(rows: Any, labels: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, Any]:
    """On the most frequent tokens: cross-entropy, and how often a method gives the label a lower probability than the base does."""
    frequent = np.isin(labels, np.argsort(-counts, kind="stable")[:FREQUENT])
    kept = [m for m in ("base", *RETRIEVERS) if m in rows]
    return {
        "tokens": int(frequent.sum()),
        "cross_entropy": {m: round(float(-rows[m][frequent].mean()), 4) for m in kept},
        "lowered": {m: round(float((rows[m] < rows["base"])[frequent].mean()), 4) for m in kept[1:]},
        "lowered_everywhere": {m: round(float((rows[m] < rows["base"]).mean()), 4) for m in kept[1:]},
    }


def targets(summaries: list[dict[str, Any]], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Check the claims beside the first base: each claim with its value per domain, and how many domains meet it."""
    first = summaries[0]["base"]
    rows = [r for r in summaries if r["base"] == first]

    def ratios(other: str) -> dict[str, float]:
        measured = {r["domain"]: r["methods"] for r in rows if other in r["methods"]}
        return {d: round(float(m["decoder"]["perplexity"]) / float(m[other]["perplexity"]), 4) for d, m in measured.items()}

    words = {r["domain"]: round(r["coherence"]["cross_entropy"]["decoder"] - r["coherence"]["cross_entropy"]["base"], 4) for r in rows}
    stores = {r["domain"]: round(next(iter(r["stores"].values()))["bytes"] / sizes[r["domain"]], 1) for r in rows if r["stores"]}
    every = len(rows)
    claims = [
        _target("decoder ÷ kNN-LM (own keys) ≤ 1", ratios("knn"), 1.0, min(4, every)),
        _target("decoder ÷ kNN-LM (the teacher's keys) ≤ 1", ratios("knn_teacher"), 1.0, min(4, every)),
        _target("decoder ÷ control ≤ 0.95", ratios("control"), 0.95, min(4, every)),
        _target("decoder ÷ DAPT < 1", ratios("dapt"), 1.0, min(3, every)),
        _target("cross-entropy on frequent tokens, decoder − base ≤ 0", words, 0.0, every),
        _target("datastore bytes ÷ decoder bytes ≥ 50", stores, 50.0, every, least=True),
    ]
    return [claim for claim in claims if claim["values"]]


def _target(claim: str, values: dict[str, float], bound: float, wanted: int, least: bool = False) -> dict[str, Any]:
    met = sum(v >= bound if least else v <= bound for v in values.values())
    return {"claim": claim, "values": values, "met": met, "wanted": wanted, "of": len(values)}


def markdown(results: dict[str, Any]) -> str:
    """The report as markdown."""
    lines = ["# Memory decoders against everything else", "", f"Hardware: {results['hardware']}. What the methods are, and what was tuned, is told in [README.md](README.md).", ""]  # fmt: skip
    names = list(dict.fromkeys(r["domain"] for r in results["results"]))
    lines += ["## Claims", "", "| claim | met in | wanted | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for t in results["targets"]:
        values = " | ".join(str(t["values"].get(n, "")) for n in names)
        lines.append(f"| {t['claim']} | {t['met']} of {t['of']} | {t['wanted']} | {values} |")
    for row in results["results"]:
        lines += [
            "",
            f"## {row['domain']}, base {row['base']}",
            "",
            f"{row['scored']:,} scored tokens of {row['documents']} documents.",
            "",
        ]
        lines += ["| method | test perplexity | 95 % interval | MB at inference | ms per token | general perplexity | tuned |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        for method, m in row["methods"].items():
            low, high = m["interval"]
            tuned = ", ".join(f"{k} {v}" for k, v in m["tuned"].items() if k != "perplexity")
            name = f"**{METHODS[method]}**" if method == "decoder" else METHODS[method]
            lines.append(f"| {name} | {m['perplexity']:.2f} | {low:.1f}–{high:.1f} | {m['bytes'] / 1e6:.1f} | {m['milliseconds']:.2f} | {m['general']:.1f} | {tuned} |")  # fmt: skip
        tail, words = row["long_tail"], row["coherence"]
        lines += ["", f"Long tail ({tail['tokens']:,} tokens, each at most {tail['at_most']} times in the training text), geometric mean of p / p_base: " + ", ".join(f"{METHODS[m]} {g}" for m, g in tail["gain"].items()) + "."]  # fmt: skip
        lines += ["", "| token | count | " + " | ".join(METHODS[m] for m in tail["named"][0] if m in METHODS) + " |", "|---|---|" + "---|" * (len(tail["named"][0]) - 2)]  # fmt: skip
        for named in tail["named"]:
            lines.append(
                f"| `{_cell(named['token'])}` | {named['count']} | " + " | ".join(f"{named[m]:.4f}" for m in METHODS if m in named) + " |"
            )
        lines += ["", f"The {FREQUENT} most frequent tokens ({words['tokens']:,} places): cross-entropy in nats " + ", ".join(f"{METHODS[m]} {c}" for m, c in words["cross_entropy"].items()) + "; share of places where the right token gets less than from the base: " + ", ".join(f"{METHODS[m]} {c:.1%}" for m, c in words["lowered"].items()) + "."]  # fmt: skip
        for method, store in row["stores"].items():
            lines += ["", f"{METHODS[method]}, datastore cut down at random (index finds {row['recall'][method]:.1%} of the 64 nearest): " + ", ".join(f"{s['entries']:,} entries, {s['bytes'] / 1e6:.0f} MB: {s['perplexity']:.1f}" for s in store["smaller"]) + "."]  # fmt: skip
        for text in row["continuations"]:
            lines += [
                "",
                f"Continuations of `{text['prompt']}`, sampled with one seed at temperature 0.8:",
                "",
                "| method | text |",
                "|---|---|",
            ]
            lines += [f"| {METHODS[m]} | {_cell(text[m])} |" for m in METHODS if m in text]
        if row["served"]:
            lines += ["", "Through the server: " + ", ".join(f"{m} {v['served']:.3f} (offline {v['offline']:.3f}, {v['served'] / v['offline'] - 1:+.3%})" for m, v in row["served"].items()) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Escape a text for a cell of a markdown table."""
    return text.replace("|", "\\|").replace("\n", "⏎").replace("`", "'")
