"""Mode `ngram` in the engine's step: against the slow exact reference, mixed with every other mode, on a base with decoders and without."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ngram_engine import EXACT, ORDERS, documents, entries, off
from ngrams import Reference
from offline import Row, run
from reference import CODE, FLOAT32, chi_square, hugging_face

from memdec.server.model.mixing import mix_sparse
from memdec.server.model.text import StepText


def test_the_sparse_mixture_equals_the_equation() -> None:
    """Softmax of the mixed logits is the mixture, lambda 1 included; the base's normaliser stays; a row of the base's mass is the base's."""
    torch.manual_seed(1)
    base = torch.randn(4, 50) * 8 + 30
    rows, tokens = torch.tensor([0, 0, 2, 3]), torch.tensor([3, 49, 7, 0])
    s, r = torch.tensor([0.2, 0.3, 1.0, 0.9]), torch.tensor([0.5, 1.0, 0.0, 0.1])
    for lam in (1e-6, 0.4, 1.0):
        lams = torch.full((4,), lam)
        mixed = mix_sparse(base, rows, tokens, s, r, lams)
        p = base.double().softmax(-1)
        expected = (1 - lam * (1 - r.double()))[:, None] * p
        expected[rows, tokens] += lam * s.double()
        torch.testing.assert_close(mixed.double().softmax(-1), expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(mixed.logsumexp(-1), base.logsumexp(-1))
        assert torch.equal(mixed[1], base[1])


def test_a_place_leads_to_the_text_before_it() -> None:
    """Requests of several tokens in the step, one with none, the first positions of a text."""
    texts = [[1, 2, 3, 4, 5], [9], [20, 21, 22]]
    text = StepText([0, 2, 2], [3, 0, 0], lambda request, first, end: texts[request][first:end])
    assert [text.up_to(place, 3) for place in range(5)] == [[2, 3, 4], [3, 4, 5], [20], [20, 21], [20, 21, 22]]
    assert text.up_to(1, 9) == [1, 2, 3, 4, 5]


def mixed_batch() -> list[Row]:
    """Every order, every kind of lambda, contexts never seen; beside them the other modes."""
    rows: list[Row] = [(CODE * 4, f"o{n}", (0.3, 0.7, 1.0)[n % 3], "ngram") for n in ORDERS]
    rows += [("import os", "a", 0.5, "ngram"), (CODE[3:] * 3, "a", 0.0, "ngram"), (CODE * 2, "strange", 0.9, "ngram")]
    return [
        *rows,
        (CODE * 5, None, 0.0, "none"),
        (CODE[5:] * 4, "a", 0.4, "decoder"),
        (CODE * 2, "a", 0.5, "knn"),
        (CODE, "b", 0.6, "decoder"),
    ]


@pytest.mark.engine
def test_every_mode_in_one_batch(toys: Path, retrieval: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """Prompts in chunks, prompt and generated tokens; whoever has nothing of a memory's is as in plain vLLM, to the last bit."""
    mix = mixed_batch()
    options: dict[str, Any] = {"sampling": {"prompt_logprobs": 1}, "datastores": {"a": retrieval}, "changed": {"ngrams": entries(ngrams)}}
    records = run(tmp_path, toys, "qwen", mix, **options)["rounds"][0]
    assert off(toys, mix, records, tmp_path) <= EXACT
    plain = run(tmp_path, toys, None, mix, sampling={"prompt_logprobs": 1})["rounds"][0]
    for i in range(len(ORDERS) + 1, len(ORDERS) + 4):
        assert records[i] == plain[i], mix[i]


@pytest.mark.engine
def test_cached_prompts_preemption_and_samples_without_a_decoder(toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """A base with no decoder at all; a KV cache too small for the batch; a second round on the first one's blocks, the base's own."""
    mix: list[Row] = [*((CODE * 16, name, 0.5, "ngram") for name in ("o3", "o8", "a")), *[(CODE * 16, None, 0.0)] * 3]
    changed = {"decoders": (), "ngrams": entries(ngrams)}
    result = run(
        tmp_path,
        toys,
        "qwen",
        mix,
        changed=changed,
        rounds=2,
        sampling={"max_tokens": 120},
        num_gpu_blocks_override=8,
        disable_log_stats=False,
    )
    assert result["preemptions"] > 0
    for records in result["rounds"]:
        assert off(toys, mix, records) <= FLOAT32
    assert any(record["cached"] for record in result["rounds"][1])


DRAFTING: dict[str, Any] = {
    "speculative_config": {"method": "custom_class", "model": "memdec.server.worker.drafter.FixedDrafter", "num_speculative_tokens": 4},
    "scheduler_cls": "memdec.server.worker.drafter.DraftingScheduler",
}


@pytest.mark.engine
def test_drafts_change_nothing(toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """N-grams and decoders draft in one batch: the same greedy tokens, log-probabilities that are exact, and some drafts accepted."""
    mix: list[Row] = [(CODE * 4, "o6", 0.9, "ngram"), (CODE * 3, "o3", 1.0, "ngram"), (CODE, None, 0.0), (CODE * 4, "a", 0.9, "decoder")]
    options: dict[str, Any] = {"changed": {"ngrams": entries(ngrams)}, "disable_log_stats": False}
    plain = run(tmp_path, toys, "qwen", mix, sampling={"max_tokens": 60}, **options)["rounds"][0]
    drafted = run(tmp_path, toys, "qwen", mix, sampling={"max_tokens": 60}, **options, **DRAFTING)
    assert [r["output"] for r in drafted["rounds"][0]] == [r["output"] for r in plain]
    assert off(toys, mix, drafted["rounds"][0]) <= FLOAT32
    counts = drafted["drafts"]
    assert all(0 < accepted <= tried for tried, accepted in counts.values()), counts


@pytest.mark.engine
@torch.inference_mode()
def test_sampled_drafts_keep_the_distribution(toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """Two tokens of five, the second one drafted, 3,000 times, beside a decoder that drafts with probabilities of its own, by chi-square."""
    draws, lam = 3000, 0.7
    ids = documents(toys)[0]
    prompt, reference, base = ids[: len(ids) // 2], Reference(documents(toys), 0, 6), hugging_face(toys / "base", torch.float32)

    def after(text: list[int]) -> np.ndarray[Any, Any]:
        p = base(torch.tensor([text])).logits[0, -1].double().softmax(-1).tolist()
        return np.array([(1 - lam) * b + lam * n for b, n in zip(p, reference.distribution(text, p), strict=True)])

    allowed = [int(t) for t in np.argsort(after(prompt))[-4:]] + [ids[len(prompt) + 1]]
    first = after(prompt)[allowed]
    seconds = [after([*prompt, token])[allowed] for token in allowed]
    expected = np.array([p / first.sum() * row / row.sum() for p, row in zip(first, seconds, strict=True)]).ravel()
    mix: list[Row] = [(prompt, "o6", lam, "ngram"), (prompt, "a", 0.9, "decoder")]
    sampling = {"temperature": 1.0, "max_tokens": 3, "n": draws, "logprobs": None, "allowed_token_ids": allowed}
    result = run(
        tmp_path, toys, "qwen", mix, changed={"ngrams": entries(ngrams)}, sampling=sampling, max_num_seqs=256, max_num_batched_tokens=2048,
        disable_log_stats=False, **DRAFTING,
    )  # fmt: skip
    seen = Counter(tuple(sample[:2]) for sample in result["rounds"][0][0]["samples"])
    assert chi_square(np.array([seen[a, b] for a in allowed for b in allowed]), draws * expected) < 5
    assert result["drafts"]["ngram"][0] > 0


@pytest.mark.engine
def test_steps_that_are_scheduled_ahead(toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """The host's table has -1 for sampled tokens then; the contexts are those that the device has."""
    mix: list[Row] = [(CODE * 3, "o6", 0.6, "ngram"), ("import os", "o8", 0.9, "ngram"), (CODE, None, 0.0), (CODE, "a", 0.5, "decoder")]
    records = run(tmp_path, toys, "qwen", mix, changed={"ngrams": entries(ngrams)}, async_scheduling=True)["rounds"][0]
    assert off(toys, mix, records) <= FLOAT32
