"""vLLM's log-probabilities against a plain Hugging Face computation of the mixture, on the mixes that hurt."""

from pathlib import Path

import pytest
import torch
from offline import Row, composite, run
from reference import CODE, FLOAT32, MIX, rounding_error, worst
from toys import with_vocabulary

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("kind", ["qwen", "gpt"])
def test_prompt_and_generated_logprobs_of_a_mixed_batch(kind: str, toys: Path, tmp_path: Path) -> None:
    """One batch of all domains, none and every lambda, prompts in chunks: Qwen2 and GPT-2 decoders beside a Qwen2 base."""
    result = run(tmp_path, toys, kind, MIX, sampling={"prompt_logprobs": 1})
    assert worst(toys, kind, MIX, result["rounds"][0]) <= FLOAT32


@pytest.mark.parametrize("stacked", [False, True])
def test_decoders_with_a_vocabulary_of_their_own(stacked: bool, toys: Path, tmp_path: Path) -> None:
    """Tokens that a decoder rules out are the base's alone; one decoder is there from the start, one is loaded later; stacked too."""
    (tmp_path / "base").symlink_to(toys / "base")
    for name, share in (("a", 0.5), ("b", 0.2)):
        with_vocabulary(toys / f"qwen_{name}", tmp_path / f"own_{name}", share)
    first = composite(tmp_path, "own", {}).decoders[:1]
    changed = {"stacked": stacked, "decoders": first, "slots": 2}
    mix = [row for row in MIX if row[2] < 1]  # at lambda 1, what is ruled out has no finite log-probability
    later = {"b": tmp_path / "own_b"}
    records = run(tmp_path, tmp_path, "own", mix, sampling={"prompt_logprobs": 1}, changed=changed, later=later)["rounds"][0]
    assert worst(tmp_path, "own", mix, records) <= FLOAT32
    assert worst(toys, "qwen", mix, records) > 0.1


def test_second_round_hits_the_prefix_cache(toys: Path, tmp_path: Path) -> None:
    """Cached blocks belong to the domain that filled them, whatever its lambda was."""
    mix: list[Row] = [(CODE * 16, None, 0.0), (CODE * 16, "a", 0.3), (CODE * 16, "b", 0.6), (CODE * 16, "a", 1.0), (CODE * 16, "b", 0.0)]
    first, second = run(tmp_path, toys, "qwen", mix, rounds=2)["rounds"]
    assert worst(toys, "qwen", mix, first) <= FLOAT32
    assert worst(toys, "qwen", mix, second) <= FLOAT32
    assert all(record["cached"] >= 128 for record in second)
    assert [r["output"] for r in first] == [r["output"] for r in second]


def test_preempted_requests_are_recomputed_with_their_own_memory(toys: Path, tmp_path: Path) -> None:
    """A KV cache too small for the batch: requests are thrown out and start again, and nothing changes."""
    mix: list[Row] = [(CODE * 8, domain, 0.5 if domain else 0.0) for domain in ("a", "b", None, "a", "b", None)]
    sampling = {"max_tokens": 120}
    result = run(tmp_path, toys, "qwen", mix, sampling=sampling, num_gpu_blocks_override=8, disable_log_stats=False)
    assert result["preemptions"] > 0
    assert worst(toys, "qwen", mix, result["rounds"][0]) <= FLOAT32


def test_bfloat16_stays_within_its_bound(toys: Path, tmp_path: Path) -> None:
    """Twice what Hugging Face's own bfloat16 models are off on the same tokens.

    A mixture's log-probability moves by no more than the larger of its parts' do, so mixing itself must add nothing; the
    factor is for the order of sums, which differs. (The toys' logits are large: the bound is about 0.2 nats here.)
    """
    records = run(tmp_path, toys, "qwen", MIX, sampling={"prompt_logprobs": 1}, dtype="bfloat16")["rounds"][0]
    off = max(rounding_error(toys / name, r["prompt"] + r["output"]) for r in records for name in ("base", "qwen_a", "qwen_b"))
    assert worst(toys, "qwen", MIX, records, torch.bfloat16) <= 2 * off


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_domain_and_lambda_zero_are_bit_identical_to_plain_vllm(dtype: str, toys: Path, tmp_path: Path) -> None:
    """The base's rows in a mixed batch equal those of the same batch in vLLM without us, to the last bit."""
    plain = run(tmp_path, toys, None, MIX, sampling={"prompt_logprobs": 1}, dtype=dtype)["rounds"][0]
    ours = run(tmp_path, toys, "qwen", MIX, sampling={"prompt_logprobs": 1}, dtype=dtype)["rounds"][0]
    untouched = [i for i, (_, domain, lam, *_) in enumerate(MIX) if domain is None or lam == 0]
    assert len(untouched) == 2
    for i in untouched:
        assert ours[i] == plain[i]


def test_compiled_equals_eager(toys: Path, tmp_path: Path) -> None:
    """With torch.compile around the base, the towers still follow each step's routing."""
    mix = MIX[:4]
    result = run(tmp_path, toys, "qwen", mix, rounds=2, enforce_eager=False)
    for records in result["rounds"]:
        assert worst(toys, "qwen", mix, records) <= FLOAT32
