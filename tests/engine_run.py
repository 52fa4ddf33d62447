"""Run one batch through an offline vLLM engine in a process of its own: `python engine_run.py JOB.json RESULT.json`.

A job is {"engine": LLM arguments, "requests": [{"prompt" (text, or token ids), "domain", "lambda", "mode", "shares", "sampling"}], "rounds": n, "traced": bool,
"later": {domain: path}}, the last ones loaded into slots 2 and on when the engine is there. The result holds, per round and request, prompt and
output token ids (of all samples), their log-probabilities, cached tokens, and the engine's counters; where parts are traced (see traced.py),
shapes and replays of each.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main(job_path: str, result_path: str) -> None:
    """Run a job."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # not when this is imported: a test's process would give it to the servers that it starts
    )
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm import LLM, SamplingParams

    from memdec.server.choice import SLOT, MemoryChoice
    from memdec.server.composite_spec import CompositeSpec
    from memdec.server.engine.client import cache_salt

    job = json.loads(Path(job_path).read_text())
    llm = LLM(**job["engine"])
    graphs = traced(llm) if job["traced"] else {}
    later = {domain: load(llm, slot, path) for slot, (domain, path) in enumerate(job["later"].items(), 2)}
    spec = CompositeSpec.of(SimpleNamespace(**job["engine"].get("hf_overrides", {})))
    revisions = ({entry.name: entry.revision for entry in spec.decoders} if spec is not None else {}) | job["later"]
    prompts: list[Any] = []
    params = []
    for request in job["requests"]:
        choice = (
            MemoryChoice(request["mode"], request["domain"], request["lambda"], shares=shares_of(request))
            if request.get("domain")
            else None
        )
        extra = choice.to_extra_args() if choice else None
        if extra and request["domain"] in later:
            extra[SLOT] = later[request["domain"]]
        sampling = SamplingParams(**request["sampling"], extra_args=extra)
        text = request["prompt"]
        prompt: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"prompt_token_ids": text}
        if (salt := cache_salt(MemoryChoice.of(sampling), revisions, None)) is not None:
            prompt["cache_salt"] = salt
        prompts.append(prompt)
        params.append(sampling)
    rounds = [[_record(o) for o in llm.generate(prompts, params, use_tqdm=False)] for _ in range(job["rounds"])]
    counted = llm.get_metrics() if not job["engine"].get("disable_log_stats", True) else []
    counters = {m.name: m.value for m in counted if hasattr(m, "value")}
    replays = {name: [len(graph.graphs), graph.replays] for name, graph in graphs.items()}
    drafts = llm.collective_rpc("draft_counts")[0] if job["engine"].get("speculative_config") else {}
    result = {
        "rounds": rounds,
        "drafts": drafts,
        "replays": replays,
        "counters": counters,
        "preemptions": counters.get("vllm:num_preemptions", 0),
    }
    Path(result_path).write_text(json.dumps(result))


def shares_of(request: dict[str, Any]) -> Any:
    """The shares of a request in mode `both`."""
    return tuple((decoder, ngram) for decoder, ngram in request.get("shares", ()))


def logged(log: str, job_path: str, result_path: str) -> None:
    """Run a job with all that is printed in a file."""
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(job_path, result_path)


def load(llm: Any, slot: int, path: str) -> int:
    """Load a decoder into a slot while the engine is there; returns the slot."""
    from memdec.decoders.reading.weights import scan

    assert llm.collective_rpc("stage_decoder", args=(slot, path, scan(Path(path)).digests)) == [None]
    while not (answers := llm.collective_rpc("load_staged", args=(1 << 30,)))[0]:
        assert answers in ([None], [False])
    assert answers == [True] and llm.collective_rpc("install_staged") == [None]
    return slot


def traced(llm: Any) -> Any:
    """Have the composite run its parts as graphs would, as far as a CPU can; returns those.

    The V2 runner captures the whole composite: here every step is prepared as if for a replay, and then run from what a graph would read.
    """
    from traced import Traced
    from vllm.config import CUDAGraphMode

    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    if not hasattr(runner, "model_state"):
        runner.get_model().wrap(Traced)
        return runner.get_model().graphs
    state = runner.model_state
    prepare = state.prepare_attn
    state.prepare_attn = lambda batch, _mode, *args, **kwargs: prepare(batch, CUDAGraphMode.FULL, *args, **kwargs)
    inputs = state.prepare_inputs

    def captured(batch: Any, states: Any) -> dict[str, Any]:
        inputs(batch, states)
        found: dict[str, Any] = state.prepare_dummy_inputs(batch.num_reqs, batch.num_tokens_after_padding)
        return found

    state.prepare_inputs = captured
    return {}


def _record(output: Any) -> dict[str, Any]:
    choice = output.outputs[0]
    ids = list(output.prompt_token_ids)
    record = {
        "prompt": ids,
        "output": list(choice.token_ids),
        "text": choice.text,
        "cached": output.num_cached_tokens,
        "logprobs": [
            step[token].logprob for step, token in zip(choice.logprobs or [], choice.token_ids if choice.logprobs else [], strict=True)
        ],
        "samples": [list(c.token_ids) for c in output.outputs],
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
    return record


if __name__ == "__main__":
    main(*sys.argv[1:])
