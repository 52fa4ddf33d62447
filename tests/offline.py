"""One batch through an offline vLLM engine in a process of its own; see engine_run.py."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_run

from memdec.server.composite_spec import CompositeSpec, DatastoreEntry, DecoderEntry
from memdec.server.routing.domains import Shares

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vllm", "vllm.v1.engine.llm_engine", "memdec.server.worker.v1"])

Prompt = str | list[int]
Row = tuple[Prompt, str | None, float] | tuple[Prompt, str | None, float, str] | tuple[Prompt, str | None, float, str, Shares]


def composite(toys: Path, kind: str, datastores: dict[str, Path]) -> CompositeSpec:
    """A base with two toy decoders, and datastores by domain."""
    decoders = tuple(DecoderEntry(name, str(toys / f"{kind}_{name}"), f"{kind}{name}") for name in "ab")
    return CompositeSpec("Qwen2ForCausalLM", decoders, tuple(DatastoreEntry(name, str(path)) for name, path in datastores.items()))


def run(
    folder: Path,
    toys: Path,
    kind: str | None,
    mix: Sequence[Row],
    rounds: int = 1,
    datastores: dict[str, Path] | None = None,
    variables: dict[str, str] | None = None,
    changed: dict[str, Any] | None = None,
    traced: bool = False,
    later: dict[str, Path] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Run a batch of (prompt, domain, lambda[, mode[, shares]]) through vLLM in its own process: the composite with decoders of `kind`, or the plain base if None.

    `variables` are set in the process's environment; `changed` are other fields of the composite's spec, `traced` and `later` are told in engine_run.py; `changes` are arguments of the engine, and `sampling`.
    """
    sampling = {"temperature": 0, "max_tokens": 24, "logprobs": 1, "ignore_eos": True, **changes.pop("sampling", {})}
    engine = {
        "model": str(toys / "base"), "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20,
        "max_num_batched_tokens": 64, "enable_chunked_prefill": True, **changes,
    }  # fmt: skip
    if kind is not None:
        spec = replace(composite(toys, kind, datastores or {}), **(changed or {}))
        engine |= {"hf_overrides": spec.overrides(), "worker_cls": "memdec.server.worker.v1.CPUMemoryWorker"}
    requests = [
        {
            "prompt": p,
            "domain": d if kind else None,
            "lambda": lam,
            "mode": (*more, "decoder")[0],
            "shares": (*more, "", ())[1],
            "sampling": sampling,
        }
        for p, d, lam, *more in mix
    ]
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(
        json.dumps(
            {
                "engine": engine,
                "requests": requests,
                "rounds": rounds,
                "traced": traced,
                "later": {n: str(p) for n, p in (later or {}).items()},
            }
        )
    )
    if variables or not engine["enforce_eager"]:
        _run_afresh(job, result, dict(variables or {}), engine["enforce_eager"])
    else:
        _run_forked(job, result)
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


def _run_afresh(job: Path, result: Path, variables: dict[str, str], eager: bool) -> None:
    """In a new interpreter: what its environment says is read while vLLM and torch are imported."""
    environment = dict(os.environ) | variables
    if not eager:
        environment.pop("TORCH_COMPILE_DISABLE", None)
    command = [sys.executable, str(Path(__file__).parent / "engine_run.py"), str(job), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def _run_forked(job: Path, result: Path) -> None:
    """In a fork of a process that has imported vLLM once for all: the import takes longer than most batches."""
    log = job.with_suffix(".log")
    process = FORKS.Process(target=engine_run.logged, args=(str(log), str(job), str(result)))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, log.read_text(errors="replace")[-4000:]
