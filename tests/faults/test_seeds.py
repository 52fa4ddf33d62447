"""A request with a seed whose prompt is divided, or which is preempted: on CPUs vLLM's own runner ends the engine at it, whoever asked."""

from pathlib import Path
from typing import Any

import pytest
from offline import Row, run
from reference import CODE

WORKERS = {"qwen": "memdec.server.worker.v1.CPUMemoryWorker", None: "memdec.server.worker.seeds.SeededCPUWorker"}
SEEDED = {"temperature": 0.8, "seed": 7, "max_tokens": 100}


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["qwen", None])
def test_a_seed_gives_the_same_however_the_prompt_is_divided(kind: str | None, toys: Path, tmp_path: Path) -> None:
    """Parts of 64 tokens, all at once, and a KV cache too small for the batch; with memories and on the base alone."""
    mix: list[Row] = [(CODE * 16, domain, 0.5 if domain else 0.0) for domain in ("a", "b", None, "a", None)]

    def answers(**changes: Any) -> list[list[int]]:
        result = run(tmp_path, toys, kind, mix, sampling=SEEDED, disable_log_stats=False, worker_cls=WORKERS[kind], **changes)
        assert bool(result["preemptions"]) == ("num_gpu_blocks_override" in changes)
        return [record["output"] for record in result["rounds"][0]]

    whole = answers(max_num_batched_tokens=2048)
    assert answers(max_num_batched_tokens=64) == whole
    assert answers(max_num_batched_tokens=64, num_gpu_blocks_override=8) == whole
