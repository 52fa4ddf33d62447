"""`make growth`: milliseconds per token as the corpus grows, through the server: base, memory decoder, n-gram memory, kNN-LM, RAG.

One run: for each number of entries a server with a datastore of that size, and an n-gram memory of as many tokens, then all methods in turn at
batch 1 and 8. Entries beyond the real ones are synthetic: a real key with noise as wide as half the keys' own spread, so that the index has the same
kind of clusters to sort; tokens beyond the real ones are real pieces of text in random order, so that contexts match. Each index is set up as one
would in production: `IVF,PQ` with exact re-ranking, as many cells visited as it takes to find nine of ten of the 64 true neighbours. The n-gram
memory alone goes on to `--tokens` (10 GB of memory while 10^8 are indexed), without drafts: what is measured is the look-up.
Writes growth.json and growth.png to loadtest/results/; prints a table and one JSON line last.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
from run import ROOT, commit, cpu, server

from memdec.decoders.datastore import build_index, write_index
from memdec.decoders.reading.datastore import CHUNK, with_exact_distances
from memdec.decoders.reading.ngram_folder import SHARD_TOKENS, vocabulary_of
from memdec.decoders.reading.ngram_index import Text, cut, write_memory
from memdec.decoders.reading.passages import Passages
from memdec.decoders.reading.retrieval import INDEX, NAME, VALUES, RetrievalPackage, describe
from memdec.decoders.reading.tokenizer import load_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "base": {},
    "decoder": {"memory": "decoder"},
    "ngram": {"memory": "ngram"},
    "knn": {"memory": "knn"},
    "rag once": {"memory": "rag"},
    "rag stride 4": {"memory": "rag", "rag_stride": 4},
}
PAPER = {"decoder": 1.28, "rag stride 4": 1.51, "knn": 2.17}  # arXiv 2508.09874, figure 6: over the base
PROMPT, TOKENS = 128, 64
RECALL, NEAREST, QUERIES = 0.9, 64, 64
PROBES = (8, 16, 32, 64, 128, 256, 512)
PIECE = 32  # tokens of real text that stay together in a synthetic one
DOCUMENT = 1 << 12  # tokens of a synthetic document


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "decoders" / "zoo" / "base")
    parser.add_argument("--decoder", type=Path, default=ROOT / "decoders" / "zoo" / "python")
    parser.add_argument("--retrieval", type=Path, default=ROOT / ".cache" / "retrieval" / "python")
    parser.add_argument("--entries", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[100_000_000], help="sizes of n-gram memories without a datastore of that size"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speculate", type=int, default=0, help="drafted tokens a step; 0: what is measured is the cost of a look-up")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "growth")
    parser.add_argument("--out", type=Path, default=ROOT / "loadtest" / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for entries in [*args.entries, *args.tokens]:
        folder, real = args.work / str(entries), RetrievalPackage.read(args.retrieval)
        shutil.rmtree(folder, ignore_errors=True)
        how = stretch(real, args.base, entries, folder / "datastore") if entries in args.entries else {}
        how["ngram"] = stretch_text(real, args.base, entries, folder / "ngram")
        command = [
            str(args.base),
            "--decoder",
            f"d={args.decoder}",
            "--ngram",
            f"d={folder / 'ngram'}",
            "--dtype",
            "float32",
            "--enforce-eager",
        ]
        command += ["--datastore", f"d={folder / 'datastore'}"] if entries in args.entries else []
        command += ["--kv-cache-memory-bytes", str(1 << 28), "--no-enable-prefix-caching", "--speculate", str(args.speculate)]
        with server(command, args.out) as url:
            for batch in (1, 8):
                rows.append({"entries": entries, "batch": batch, **how, "ms": measure(url, batch, args.rounds)})
                print(table(rows[-1:]), flush=True)
        shutil.rmtree(folder)  # gigabytes
    results = {
        "hardware": {"processor": cpu(), "cores": os.cpu_count()},
        "commit": commit(),
        "rows": rows,
        "prompt": PROMPT,
        "tokens": TOKENS,
    }
    (args.out / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(rows, args.out / "growth.png")
    print(
        f"\n{cpu()}, {os.cpu_count()} cores; {PROMPT} tokens of prompt, {TOKENS} generated, float32; median of {args.rounds} rounds\n\n{table(rows)}\n"
    )
    flat = {
        f"{r['entries']:.0e}_b{r['batch']}": {m: round(v["median"] / r["ms"]["base"]["median"], 3) for m, v in r["ms"].items()}
        for r in rows
    }
    print(json.dumps({"benchmark": "growth", "commit": commit(), "ratio_to_base": flat}))


def stretch(real: RetrievalPackage, base: Path, entries: int, out: Path) -> dict[str, Any]:
    """A retrieval folder of `entries` entries made from a real one; returns cells, cells visited and recall."""
    out.mkdir(parents=True)
    random = np.random.default_rng(0)
    source = real.datastore()
    own = source.index.refine_index if isinstance(source.index, faiss.IndexRefine) else source.index
    sources = random.integers(0, own.ntotal, entries)
    sources[: min(entries, own.ntotal)] = np.arange(min(entries, own.ntotal))  # the real ones first
    width = source.index.d
    originals = np.empty((own.ntotal, width), np.float32)
    own.reconstruct_n(0, own.ntotal, originals)
    noise = 0.5 * originals.std(0)
    keys = np.lib.format.open_memmap(out / "keys.npy", "w+", np.float16, (entries, width))
    for start in range(0, entries, CHUNK):
        picked = originals[sources[start : start + CHUNK]]
        synthetic = np.arange(start, start + len(picked))[:, None] >= own.ntotal
        keys[start : start + len(picked)] = picked + synthetic * noise * random.standard_normal(picked.shape, np.float32)
    np.save(out / VALUES, np.asarray(source.values)[sources])
    queries = (originals[random.integers(0, own.ntotal, QUERIES)] + noise * random.standard_normal((QUERIES, width))).astype(np.float32)
    index = build_index(keys)
    cells = index.nlist  # type: ignore[attr-defined]
    refined = with_exact_distances(index, keys)
    write_index(refined, out / INDEX)
    del index, refined
    probed, recall = tune(faiss.read_index(str(out / INDEX), faiss.IO_FLAG_MMAP_IFC), keys, queries, real.neighbours)

    tokens = Passages.open(real.path, load_tokenizer(base)).ids
    pieces = np.asarray(tokens).reshape(-1, 8)  # passages of the same words in other company
    passages = pieces[random.integers(0, len(pieces), entries // 8)].reshape(-1)
    Passages.build(passages, load_tokenizer(base), real.rag.passage).save(out)
    (out / "keys.npy").unlink()
    record = json.loads((real.path / NAME).read_text())
    record |= {"entries": entries, "knn": record["knn"] | {"probed": probed}}
    record["files"] = {str(f.relative_to(out)): describe(f) for f in sorted(out.rglob("*")) if f.is_file()}
    (out / NAME).write_text(json.dumps(record))
    return {
        "cells": cells,
        "probed": probed,
        "recall": recall,
        "neighbours": real.neighbours,
        "megabytes": round(sum(f["bytes"] for f in record["files"].values()) / 1e6),
    }


def stretch_text(real: RetrievalPackage, base: Path, tokens: int, out: Path) -> dict[str, Any]:
    """An n-gram memory of `tokens` tokens made from a datastore's text; returns seconds that it took, and its size."""
    random = np.random.default_rng(0)
    tokenizer = load_tokenizer(base)
    vocabulary = vocabulary_of(tokenizer)
    begun = time.perf_counter()
    own = np.asarray(Passages.open(real.path, tokenizer).ids)
    own = own[own != vocabulary.end]
    pieces = own[: len(own) // PIECE * PIECE].reshape(-1, PIECE)
    picked = random.integers(0, len(pieces), tokens // PIECE + 1)
    picked[: len(pieces)] = np.arange(min(len(pieces), len(picked)))  # the real ones first
    ids = pieces[picked].reshape(-1)[:tokens].astype(np.uint32)
    ends = np.append(np.arange(DOCUMENT, tokens, DOCUMENT), tokens)
    ids[ends - 1] = vocabulary.end
    text = Text(ids, ends, [f"d{i}" for i in range(len(ends))])
    write_memory(out, "d", cut(text, SHARD_TOKENS), vocabulary)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"seconds": round(time.perf_counter() - begun, 1), "megabytes": round(size / 1e6)}


def tune(index: faiss.Index, keys: Any, queries: np.ndarray[Any, Any], neighbours: int) -> tuple[int, float]:
    """The fewest cells with which RECALL of the true nearest is among the `neighbours` found, and what is found then."""
    best = np.full((len(queries), NEAREST), np.inf, np.float32), np.zeros((len(queries), NEAREST), np.int64)
    for start in range(0, len(keys), CHUNK):
        distances, numbers = faiss.knn(queries, np.asarray(keys[start : start + CHUNK], np.float32), NEAREST)
        both = np.concatenate([best[0], distances], 1), np.concatenate([best[1], numbers + start], 1)
        order = np.argsort(both[0], 1)[:, :NEAREST]
        best = np.take_along_axis(both[0], order, 1), np.take_along_axis(both[1], order, 1)
    recall = 0.0
    library: Any = faiss  # its stubs lack the parameters' keywords
    for probed in PROBES:
        parameters = library.IndexRefineSearchParameters(k_factor=4, base_index_params=library.SearchParametersIVF(nprobe=probed))
        _, numbers = index.search(queries, neighbours, params=parameters)
        recall = float(np.mean([np.isin(t, f).mean() for t, f in zip(best[1], numbers, strict=True)]))
        if recall >= RECALL:
            break
    return probed, round(recall, 3)


def measure(url: str, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per token of every method that the server has: a batch of equal requests, from the first sent to the last answered, over the tokens of one."""
    random = np.random.default_rng(batch)
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(batch) as pool:
        modes = http.get("/v1/domains").json()["data"][0]["modes"]
        offered = {name: fields for name, fields in METHODS.items() if not fields or fields["memory"] in modes}
        taken: dict[str, list[float]] = {name: [] for name in offered}
        text = http.post("/tokenize", json={"prompt": Path(statistics.__file__).read_text()[:20_000]}).json()["tokens"]
        for number in range(rounds + 1):  # the first warms up
            starts = random.integers(0, len(text) - PROMPT, batch)
            for name, fields in offered.items():
                chosen = {"domain": "d", **fields} if fields else {}
                bodies = [
                    {"prompt": text[s : s + PROMPT], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **chosen}
                    for s in starts.tolist()
                ]
                begun = time.perf_counter()
                for answer in pool.map(lambda body: http.post("/v1/completions", json=body), bodies):
                    answer.raise_for_status()
                if number:
                    taken[name].append(1000 * (time.perf_counter() - begun) / TOKENS)
    return {
        name: {"median": round(statistics.median(v), 3), "least": round(min(v), 3), "most": round(max(v), 3)} for name, v in taken.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds per token, and times the base."""
    lines = [
        "| tokens | n-grams MB | datastore MB | cells visited | recall | batch | " + " | ".join(METHODS) + " |",
        "|---" * (6 + len(METHODS)) + "|",
    ]
    for row in rows:
        base = row["ms"]["base"]["median"]
        cells = [f"{v['median']:.2f} ({v['median'] / base:.2f}×)" if (v := row["ms"].get(name)) else "–" for name in METHODS]
        index = (f"{row['megabytes']:,}", f"{row['probed']} of {row['cells']}", f"{row['recall']}") if "cells" in row else ("–",) * 3
        head = " | ".join((f"{row['entries']:,}", f"{row['ngram']['megabytes']:,}", *index, f"{row['batch']}"))
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Times the base against entries, a panel a batch size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, batch in zip(panels, (1, 8), strict=True):
        part = [r for r in rows if r["batch"] == batch]
        for name in METHODS:
            had = [r for r in part if name in r["ms"]]
            line = [r["ms"][name]["median"] / r["ms"]["base"]["median"] for r in had]
            (drawn,) = axes.plot([r["entries"] for r in had], line, marker="o", label=name)
            if name in PAPER and batch == 1:
                axes.axhline(PAPER[name], color=drawn.get_color(), linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="tokens of the corpus", title=f"batch {batch}")
        axes.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
        axes.minorticks_off()
    panels[0].set_ylabel("time per token ÷ the base's")
    panels[0].legend(title="dotted: the paper's", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
