"""vLLM's V2 model runner, the default on CUDA, with its kernels in Triton's interpreter: the same parity as the V1 runner's."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ngram_engine import EXACT, documents, entries, off, off_both
from offline import Row, run
from reference import CODE, FLOAT32, MIX, worst
from tools import needs

TRITON = Path(sys.prefix) / "triton"
pytestmark = [pytest.mark.slow, needs("triton", "make install-dev puts it there", found=str(TRITON) if TRITON.exists() else None)]
V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT / "tests" / "v2_on_cpu", TRITON, ROOT)),
}


@pytest.mark.parametrize("kind", ["qwen", "gpt"])
def test_prompt_and_generated_logprobs_of_a_mixed_batch(kind: str, toys: Path, tmp_path: Path) -> None:
    """All domains, none and every lambda, prompts in chunks, in one batch."""
    result = run(tmp_path, toys, kind, MIX, sampling={"prompt_logprobs": 1, "max_tokens": 8}, variables=V2)
    assert worst(toys, kind, MIX, result["rounds"][0]) <= FLOAT32


@pytest.mark.parametrize("kind", ["qwen", "gpt"])
def test_stacked_decoders(kind: str, toys: Path, tmp_path: Path) -> None:
    """Weights picked by vLLM's own kernel, and nothing told in Python, as when the step is one CUDA graph."""
    sampling = {"prompt_logprobs": 1, "max_tokens": 8}
    result = run(tmp_path, toys, kind, MIX, sampling=sampling, variables=V2, changed={"stacked": True}, traced=True)
    assert worst(toys, kind, MIX, result["rounds"][0]) <= FLOAT32


def test_cached_prompts_and_preemption(toys: Path, tmp_path: Path) -> None:
    """A second round on the first one's blocks, with a KV cache too small for the batch."""
    mix: list[Row] = [(CODE * 12, domain, 0.5 if domain else 0.0) for domain in ("a", "b", None, "a")]
    result = run(tmp_path, toys, "qwen", mix, rounds=2, sampling={"max_tokens": 12}, variables=V2, num_gpu_blocks_override=6)
    for records in result["rounds"]:
        assert worst(toys, "qwen", mix, records) <= FLOAT32


def test_untouched_rows_are_those_of_plain_vllm(toys: Path, tmp_path: Path) -> None:
    """Requests without a domain, or with lambda 0, to the last bit."""
    plain, ours = (
        run(tmp_path, toys, kind, MIX, sampling={"prompt_logprobs": 1, "max_tokens": 6}, variables=V2)["rounds"][0]
        for kind in (None, "qwen")
    )
    for i, (_, domain, lam, *_) in enumerate(MIX):
        if domain is None or lam == 0:
            assert ours[i] == plain[i]


@pytest.mark.parametrize("stacked", [False, True])
def test_n_grams(stacked: bool, toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """Its own tables of tokens; with decoders that run as one CUDA graph would, and without any decoder."""
    mix: list[Row] = [(CODE * 3, "o6", 0.6, "ngram"), ("import os", "o8", 0.9, "ngram"), (CODE, None, 0.0)]
    mix += [(CODE, "a", 0.5, "decoder")] if stacked else []
    changed: dict[str, Any] = {"ngrams": entries(ngrams), **({"stacked": True} if stacked else {"decoders": ()})}
    result = run(
        tmp_path, toys, "qwen", mix, changed=changed, traced=stacked, sampling={"prompt_logprobs": 1, "max_tokens": 8}, variables=V2
    )
    assert off(toys, mix, result["rounds"][0]) <= FLOAT32


@pytest.mark.parametrize("stacked", [False, True])
def test_decoder_and_n_grams_in_one_mixture(stacked: bool, toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """Beside each memory alone and the base; in the form of steps that are one CUDA graph, too."""
    mix: list[Row] = [
        (CODE * 3, "a", 0.6, "both", ((0.7, 0.1), *[(0.3, 0.7)] * 7)),
        ("import os", "a", 1.0, "both", ((0.5, 0.5),) * 8),
        (CODE, "a", 0.5, "ngram"),
        (CODE, None, 0.0),
        (CODE, "a", 0.5, "decoder"),
    ]
    result = run(
        tmp_path, toys, "qwen", mix, changed={"ngrams": entries({"a": ngrams["a"]}), "stacked": stacked}, traced=stacked,
        sampling={"prompt_logprobs": 1, "max_tokens": 8}, variables=V2,
    )  # fmt: skip
    assert off_both(toys, mix, result["rounds"][0], {"a": documents(toys)}) <= EXACT
    assert off(toys, mix, result["rounds"][0]) <= FLOAT32
