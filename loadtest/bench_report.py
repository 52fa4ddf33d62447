"""The report of `make bench`: ratios, markdown, plot."""

from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
PARTS = {"1": "random models", "2": "embedded models", "3": "domains loaded", "4": "time to first token"}


def ratio(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By batch, everything over plain vLLM of the same run."""
    rows: dict[str, dict[str, float]] = {f"b{batch}": {} for batch in BATCHES}
    for batch, row in rows.items():
        shape = results.get("shapes", {}).get(batch, {})
        for name in ("no_domain", "one_domain", "two_domains", "reference"):
            if name in shape:
                row[name] = shape[name]["ratio"]["median"]
        floor = results.get("floor", {}).get("37M", 1.0)
        for name, over in (("one_domain", floor), ("two_domains", 2 * floor - 1)):
            if name in row:
                row[f"{name}_over_floor"] = round(row[name] / over, 3)
        for way in ("greedy", "sampled"):
            if f"{batch} {way}" in results.get("embedded", {}):
                row[f"speculative_{way}"] = results["embedded"][f"{batch} {way}"]["adaptive"]["ratio"]["median"]
    return rows


def cell(row: dict[str, Any]) -> str:
    """Milliseconds and ratio, each as median with the least and the most."""
    ms, over = row["ms"], row["ratio"]
    return f"{ms['median']:.2f} | **{over['median']:.2f}** ({over['min']:.2f} to {over['max']:.2f})"


def report(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# What a memory costs, and what it saves", "", f"`make bench`, {results['hardware']}.", ""]
    lines += [f"* {PARTS[part]}: {how}" for part, how in sorted(results["runs"].items())] + [""]
    if "shapes" in results:
        floor = results["floor"]
        lines += [
            "## Random models: base 0.4 B, decoders of 37 M (0.1 B where it says so), bfloat16", "",
            f"The floor, by bytes of weights: one domain {floor['37M']} ({floor['0.1B']} with 0.1 B), two {2 * floor['37M'] - 1:.3f} ({2 * floor['0.1B'] - 1:.3f}).", "",
            "| batch | | ms per token | over plain vLLM |", "|---|---|---|---|",
        ]  # fmt: skip
        lines += [f"| {batch[1:]} | {name} | {cell(row)} |" for batch, rows in results["shapes"].items() for name, row in rows.items()]
        parts = ("base", "memory", "mixing")
        lines += ["", "Where a step's time goes, ms:", "", f"| batch | | {' | '.join(parts)} | rest |", "|---|---|---|---|---|---|"]
        for batch, rows in results["shapes"].items():
            for name, row in rows.items():
                if own := row.get("parts"):
                    rest = row["ms"]["median"] - sum(own[part] for part in parts)
                    lines.append(f"| {batch[1:]} | {name} | {' | '.join(f'{own[part]:.2f}' for part in parts)} | {rest:.2f} |")
    if "embedded" in results:
        lines += ["", "## The embedded models on prompts of their domains, float32", ""]
        for title, rows in results["embedded"].items():
            lines += [
                f"### {title.replace('b', 'batch ', 1)}",
                "",
                "| K | ms per token | over plain vLLM | accepted up to position 1, 2, ... | same text as K = 0 |",
            ]
            lines += ["|---|---|---|---|---|"]
            for name, row in rows.items():
                taken = "; ".join(f"{d} {' '.join(f'{x:.2f}' for x in a)}" for d, a in row.get("acceptance", {}).items())
                same = row.get("same_as_without")
                lines.append(f"| {name} | {cell(row)} | {taken} | {f'{same[0]} of {same[1]}' if same else ''} |")
            lines.append("")
    if "loaded" in results:
        lines += ["## Domains loaded, one of them active", "", "| loaded | ms per token | over one | resident MB |", "|---|---|---|---|"]
        lines += [f"| {n} | {cell(row)} | {row['resident_mb']} |" for n, row in results["loaded"].items()]
    if "first_token" in results:
        lines += ["", f"## Time to first token; the floor, by multiplications, is {results['first_token']['floor']}", ""]
        lines += ["| prompt | | ms | over plain vLLM |", "|---|---|---|---|"]
        lines += [
            f"| {n} | {name} | {cell(row)} |" for n, rows in results["first_token"].items() if n != "floor" for name, row in rows.items()
        ]
    return "\n".join([*lines, "", "![](bench.png)", ""])


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per token over the base's: without speculation by kind of batch, with it by K."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in ("no_domain", "one_domain", "two_domains", "four_domains", "reference"):
        points = [(int(b[1:]), rows[name]["ratio"]["median"]) for b, rows in results.get("shapes", {}).items() if name in rows]
        left.plot(*zip(*points, strict=True), marker="o", label=name.replace("_", " ")) if points else None
    left.set(xlabel="batch", ylabel="ms per token over plain vLLM", xscale="log", title="0.4 B base, 37 M decoders")
    left.set_xticks(BATCHES, [str(b) for b in BATCHES])
    left.minorticks_off()
    for title, rows in results.get("embedded", {}).items():
        ks = [k for k in ("0", "1", "2", "3", "4", "5", "6", "adaptive") if k in rows]
        right.plot(ks, [rows[k]["ratio"]["median"] for k in ks], marker="o", label=title.replace("b", "batch ", 1))
    right.set(xlabel="tokens drafted", ylabel="ms per token over plain vLLM", title="embedded models, real prompts")
    for axes in (left, right):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
        axes.legend(loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
