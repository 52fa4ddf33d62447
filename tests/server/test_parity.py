"""vLLM's log-probabilities against a plain Hugging Face computation of the mixture, on the mixes that hurt."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from offline import run
from transformers import AutoModelForCausalLM, PreTrainedModel

FLOAT32 = 1e-4  # largest difference of a log-probability allowed, in nats
CODE = "def scale(self, x):\n    return x + 1\n"
MIX = [  # prompt, domain, lambda: all domains and none, every kind of lambda, prompts longer and shorter than a chunk
    (CODE * 8, None, 0.0),
    (CODE * 8, "a", 0.3),
    (CODE * 8, "b", 0.6),
    (CODE, "a", 1.0),
    (CODE[5:] * 7, "b", 0.0),
    (CODE[9:] * 6, "a", 0.6),
    ("import os", "b", 0.3),
]


@lru_cache
def hugging_face(folder: Path, stored: torch.dtype) -> PreTrainedModel:
    """A toy whose weights were rounded to `stored`, computing in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=stored).float().eval()
    return model


@torch.inference_mode()
def reference(toys: Path, kind: str, ids: list[int], domain: str | None, lam: float, stored: torch.dtype) -> torch.Tensor:
    """log(lambda * p_mem + (1 - lambda) * p_base) at every position, float64 [tokens, V]: the slow, obvious way."""
    tokens = torch.tensor([ids])
    base = hugging_face(toys / "base", stored)(tokens).logits[0].double().softmax(-1)
    if domain is not None:
        decoder = hugging_face(toys / f"{kind}_{domain}", stored)
        logits = decoder(tokens.clamp(max=decoder.config.vocab_size - 1)).logits[0].double()
        shared = min(base.shape[-1], logits.shape[-1])  # ids that only one of the two has are padding
        base = (1 - lam) * base
        base[:, :shared] += lam * logits[:, :shared].softmax(-1)
    return base.log()


@torch.inference_mode()
def rounding_error(folder: Path, ids: list[int]) -> float:
    """Largest difference of a token's log-probability between bfloat16 and float32 arithmetic on one model's bfloat16 weights."""
    exact = hugging_face(folder, torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.tensor([ids]).clamp(max=exact.config.vocab_size - 1)
    ours, theirs = (m(tokens[:, :-1]).logits[0].float().log_softmax(-1).gather(1, tokens[0, 1:, None]) for m in (exact, rounded))
    return float((ours - theirs).abs().max())


def worst(
    toys: Path, kind: str, mix: list[tuple[str, str | None, float]], records: list[dict[str, Any]], stored: torch.dtype = torch.float32
) -> float:
    """Largest difference between vLLM's log-probabilities, generated and of the prompt, and the reference's."""
    largest = 0.0
    for (_, domain, lam), record in zip(mix, records, strict=True):
        ids = record["prompt"] + record["output"]
        logprobs = reference(toys, kind, ids, domain, lam, stored)
        ours = record.get("prompt_logprobs", []) + record["logprobs"]
        first = len(ids) - len(ours)
        theirs = [logprobs[i - 1, ids[i]].item() for i in range(first, len(ids))]
        largest = max(largest, max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        assert all(math.isfinite(x) for x in ours)
    return largest


@pytest.mark.parametrize("kind", ["qwen", "gpt"])
def test_prompt_and_generated_logprobs_of_a_mixed_batch(kind: str, toys: Path, tmp_path: Path) -> None:
    """One batch of all domains, none and every lambda, prompts in chunks: Qwen2 and GPT-2 decoders beside a Qwen2 base."""
    result = run(tmp_path, toys, kind, MIX, sampling={"prompt_logprobs": 1})
    assert worst(toys, kind, MIX, result["rounds"][0]) <= FLOAT32


def test_second_round_hits_the_prefix_cache(toys: Path, tmp_path: Path) -> None:
    """Cached blocks belong to the domain that filled them, whatever its lambda was."""
    mix = [(CODE * 16, None, 0.0), (CODE * 16, "a", 0.3), (CODE * 16, "b", 0.6), (CODE * 16, "a", 1.0), (CODE * 16, "b", 0.0)]
    first, second = run(tmp_path, toys, "qwen", mix, rounds=2)["rounds"]
    assert worst(toys, "qwen", mix, first) <= FLOAT32
    assert worst(toys, "qwen", mix, second) <= FLOAT32
    assert all(record["cached"] >= 128 for record in second)
    assert [r["output"] for r in first] == [r["output"] for r in second]


def test_preempted_requests_are_recomputed_with_their_own_memory(toys: Path, tmp_path: Path) -> None:
    """A KV cache too small for the batch: requests are thrown out and start again, and nothing changes."""
    mix = [(CODE * 8, domain, 0.5 if domain else 0.0) for domain in ("a", "b", None, "a", "b", None)]
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
    untouched = [i for i, (_, domain, lam) in enumerate(MIX) if domain is None or lam == 0]
    assert len(untouched) == 2
    for i in untouched:
        assert ours[i] == plain[i]


def test_compiled_equals_eager(toys: Path, tmp_path: Path) -> None:
    """With torch.compile around the base, the towers still follow each step's routing."""
    mix = MIX[:4]
    result = run(tmp_path, toys, "qwen", mix, rounds=2, enforce_eager=False)
    for records in result["rounds"]:
        assert worst(toys, "qwen", mix, records) <= FLOAT32
