"""The study's plots: perplexity by method, and perplexity against bytes."""

from pathlib import Path
from typing import Any

from memdec.decoders.study.scores import METHODS

COLOURS = {
    "base": "#9a9a9a", "rag": "#c9a227", "knn": "#7aa6c2", "knn_teacher": "#2f6690",
    "dapt": "#b56576", "lora": "#e5989b", "control": "#8ab17d", "decoder": "#1b7f5c",
}  # fmt: skip


def write_plots(out: Path, results: dict[str, Any]) -> None:
    """Write perplexity-<base>.png and compression.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    rows: list[dict[str, Any]] = results["results"]
    for base in dict.fromkeys(r["base"] for r in rows):
        _points(out / f"perplexity-{base}.png", [r for r in rows if r["base"] == base], base)
    _compression(out / "compression.png", [r for r in rows if r["base"] == rows[0]["base"]], results["decoder_bytes"])


def _points(path: Path, rows: list[dict[str, Any]], base: str) -> None:
    """Perplexity divided by the base's, on a log scale; a group of points per domain."""
    from matplotlib import pyplot as plt

    methods = [m for m in METHODS if m != "base" and any(m in r["methods"] for r in rows)]
    figure, axis = plt.subplots(figsize=(10, 4.2))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        places, values, errors = [], [], []
        for at, row in enumerate(rows):
            if method in row["methods"]:
                bottom, figures = row["methods"]["base"]["perplexity"], row["methods"][method]
                places.append(at + (number - len(methods) / 2 + 0.5) * width)
                values.append(figures["perplexity"] / bottom)
                errors.append([abs(figures["perplexity"] - side) / bottom for side in figures["interval"]])
        axis.errorbar(
            places,
            values,
            yerr=list(zip(*errors, strict=True)),
            fmt="o",
            label=METHODS[method],
            color=COLOURS[method],
            markersize=6,
            capsize=2,
        )
    axis.set_yscale("log")
    axis.axhline(1, color=COLOURS["base"], linewidth=1)
    for between in range(1, len(rows)):
        axis.axvline(between - 0.5, color="#dddddd", linewidth=1)
    _plain_numbers(axis.yaxis)
    axis.set_xticks(range(len(rows)), [f"{r['domain']}\n(base {r['methods']['base']['perplexity']:.0f})" for r in rows])
    axis.set_ylabel("test perplexity ÷ the base's")
    axis.set_title(f"Beside base {base}; lower is better; bars: 95 % interval over documents")
    axis.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _compression(path: Path, rows: list[dict[str, Any]], sizes: dict[str, int]) -> None:
    """Perplexity against the bytes that are needed beside the base: datastores of several sizes, and the decoder."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(3.2 * len(rows), 3.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        for method, store in row["stores"].items():
            points = sorted((s["bytes"] / 1e6, s["perplexity"]) for s in store["smaller"])
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[method], label=METHODS[method], markersize=3)
        axis.plot(
            sizes[row["domain"]] / 1e6,
            row["methods"]["decoder"]["perplexity"],
            "*",
            color=COLOURS["decoder"],
            markersize=13,
            label=METHODS["decoder"],
        )
        axis.axhline(row["methods"]["base"]["perplexity"], color=COLOURS["base"], linewidth=1, label="base")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(row["domain"])
        _plain_numbers(axis.yaxis)
        axis.set_xlabel("MB beside the base")
    axes[0][0].set_ylabel("test perplexity")
    figure.legend(
        *max((a.get_legend_handles_labels() for a in axes[0]), key=lambda legend: len(legend[1])),
        fontsize=8,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _plain_numbers(axis: Any) -> None:
    """Label a log axis with plain numbers: 0.2 instead of 2 × 10⁻¹."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
