"""With the memory drafting for itself: the same greedy answers, the same distribution of sampled ones, the same log-probabilities."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from asking import ask, chat
from conftest import Server, metric, start_server, stop_server
from offline import Row, run
from reference import CODE, FLOAT32, MIX, chi_square, hugging_face, worst
from transformers import AutoTokenizer

pytestmark = pytest.mark.engine

SPECULATION: dict[str, Any] = {
    "speculative_config": {"method": "custom_class", "model": "memdec.server.worker.drafter.FixedDrafter", "num_speculative_tokens": 3},
    "scheduler_cls": "memdec.server.worker.drafter.DraftingScheduler",
}
# Toys are unlike each other: with much of the memory in the mixture, drafts are accepted as real ones are.
CLOSE: list[Row] = [(CODE * 8, "a", 0.9), (CODE[3:] * 5, "b", 0.95), (CODE, None, 0.0), (CODE[9:] * 6, "a", 1.0), ("import os", "b", 0.8)]


def accepted(result: dict[str, Any]) -> float:
    """Share of the drafted tokens that were accepted."""
    counters = result["counters"]
    return float(counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_draft_tokens"])


@pytest.mark.parametrize("kind", ["qwen", "gpt"])
def test_greedy_answers_and_logprobs_are_those_without(kind: str, toys: Path, tmp_path: Path) -> None:
    """All domains, none and every lambda in one batch: the same tokens, and the mixture's log-probabilities as Hugging Face has them."""
    mix = [*CLOSE, *MIX]
    options: dict[str, Any] = {"sampling": {"prompt_logprobs": 1, "max_tokens": 40}, "disable_log_stats": False}
    plain = run(tmp_path, toys, kind, mix, **options)["rounds"][0]
    options["sampling"] = {"prompt_logprobs": 1, "max_tokens": 40}
    drafted = run(tmp_path, toys, kind, mix, **options, **SPECULATION)
    assert [r["output"] for r in drafted["rounds"][0]] == [r["output"] for r in plain]
    assert worst(toys, kind, mix, drafted["rounds"][0]) <= FLOAT32
    assert 0.2 < accepted(drafted) < 1  # both branches of the verifier have run


def test_lambda_one_accepts_all(toys: Path, tmp_path: Path) -> None:
    """The memory alone agrees with itself: whatever is rejected here was drafted from another state than the verifier's."""
    mix: list[Row] = [(CODE * 8, "a", 1.0), (CODE * 3, "b", 1.0), ("import os", "a", 1.0)]
    result = run(tmp_path, toys, "qwen", mix, sampling={"max_tokens": 60}, disable_log_stats=False, **SPECULATION)
    assert accepted(result) == 1


def test_preempted_and_cached_requests_draft_on(toys: Path, tmp_path: Path) -> None:
    """A KV cache too small for the batch, and a second round that finds its prompts cached."""
    mix: list[Row] = [(CODE * 8, domain, 0.9 if domain else 0.0) for domain in ("a", "b", None, "a", "b", None)]
    options: dict[str, Any] = {"num_gpu_blocks_override": 8, "disable_log_stats": False, "rounds": 2}
    result = run(tmp_path, toys, "qwen", mix, sampling={"max_tokens": 120}, **options, **SPECULATION)
    assert result["preemptions"] > 0
    for records in result["rounds"]:
        assert worst(toys, "qwen", mix, records) <= FLOAT32
    assert accepted(result) > 0.2


def test_to_the_end_of_the_context(toys: Path, tmp_path: Path) -> None:
    """Requests that run into the longest context, beside some that don't: all as without drafts."""
    mix: list[Row] = [(CODE * 28, "a", 0.9), (CODE, "b", 0.9), (CODE * 29, "b", 1.0)]
    plain, drafted = (run(tmp_path, toys, "qwen", mix, sampling={"max_tokens": 400}, **more)["rounds"][0] for more in ({}, SPECULATION))
    assert [r["output"] for r in drafted] == [r["output"] for r in plain]
    assert len(plain[0]["prompt"]) + len(plain[0]["output"]) == 512


@torch.inference_mode()
def next_probabilities(toys: Path, sequences: list[list[int]], lam: float) -> np.ndarray[Any, Any]:
    """The mixture after each sequence (all of one length), float64 [n, V], domain a."""
    tokens = torch.tensor(sequences)
    base, memory = (
        model(tokens.clamp(max=model.config.vocab_size - 1)).logits[:, -1].double().softmax(-1)
        for model in (hugging_face(toys / name, torch.float32) for name in ("base", "qwen_a"))
    )
    base *= 1 - lam
    base[:, : memory.shape[1]] += lam * memory[:, : base.shape[1]]
    return np.asarray(base)


def test_sampled_answers_follow_the_mixture(toys: Path, tmp_path: Path) -> None:
    """10,000 draws: the second token over the whole vocabulary, and three tokens over a vocabulary of five, by chi-square.

    The first token comes without drafts. Errors of the kind that speculation can make (a residual not subtracted, drafts from
    another distribution than the one declared) shift these by dozens of standard deviations.
    """
    draws, lam = 10_000, 0.6
    prompt = AutoTokenizer.from_pretrained(toys / "base")(CODE)["input_ids"]
    free = run(
        tmp_path, toys, "qwen", [(CODE, "a", lam)], sampling={"temperature": 1.5, "max_tokens": 3, "n": draws, "logprobs": None},
        max_num_seqs=256, max_num_batched_tokens=2048, disable_log_stats=False, **SPECULATION,
    )  # fmt: skip
    assert 0.2 < accepted(free) < 1
    samples = free["rounds"][0][0]["samples"]
    assert len(samples) == draws

    def tempered(sequences: list[list[int]]) -> np.ndarray[Any, Any]:
        p = next_probabilities(toys, sequences, lam) ** (1 / 1.5)
        return np.asarray(p / p.sum(-1, keepdims=True))

    first = tempered([prompt])[0]
    second = first @ tempered([[*prompt, t] for t in range(len(first))])
    counts = np.bincount([s[1] for s in samples], minlength=len(first))
    assert chi_square(np.bincount([s[0] for s in samples], minlength=len(first)), draws * first) < 5
    assert chi_square(counts, draws * second) < 5

    allowed = [int(t) for t in np.argsort(first)[-5:]]
    few = run(
        tmp_path, toys, "qwen", [(CODE, "a", lam)], sampling={"temperature": 1.0, "max_tokens": 3, "n": draws, "logprobs": None, "allowed_token_ids": allowed},
        max_num_seqs=256, max_num_batched_tokens=2048, disable_log_stats=False, **SPECULATION,
    )  # fmt: skip
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        keys = list(joint)
        rows = next_probabilities(toys, [[*prompt, *key] for key in keys], lam)[:, allowed]
        rows /= rows.sum(-1, keepdims=True)
        joint = {(*key, t): joint[key] * row[i] for key, row in zip(keys, rows, strict=True) for i, t in enumerate(allowed)}
    seen = Counter(tuple(s) for s in few["rounds"][0][0]["samples"])
    order = list(itertools.product(allowed, repeat=3))
    assert chi_square(np.array([seen[k] for k in order]), draws * np.array([joint[k] for k in order])) < 5


@pytest.fixture(scope="module")
def drafting(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The session's server again, drafting."""
    running = start_server(
        tmp_path_factory.mktemp("drafting") / "log.txt", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--decoder", f"b={toys / 'qwen_b'}",
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20), "--speculate", "3",
    )  # fmt: skip
    yield running
    stop_server(running)


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 40},
        {"max_tokens": 40, "lam": 1.0},
        {"max_tokens": 40, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"max_tokens": 40, "repetition_penalty": 1.3},
        {"max_tokens": 40, "stop": ["e", "t"]},
        {"max_tokens": 40, "min_tokens": 20, "ignore_eos": False},
        {"max_tokens": 20, "n": 3, "temperature": 1.0, "top_k": 1},
        {"max_tokens": 20, "logprobs": 3},
        {"max_tokens": 10, "logprobs": 2, "echo": True},
        {"max_tokens": 30, "bad_words": ["a", "the"]},
        {"max_tokens": 30, "allowed_token_ids": list(range(50, 90))},
        {"max_tokens": 60, "response_format": SCHEMA},
        {"max_tokens": 30, "structured_outputs": {"regex": "[a-f]{12}[0-9]+"}},
        {"max_tokens": 30, "temperature": 1.0, "top_k": 1},
        {"max_tokens": 30, "temperature": 1.0, "top_p": 1e-9},
        {"max_tokens": 30, "temperature": 1.0, "min_p": 1.0},
        {"max_tokens": 30, "logit_bias": {"80": 100.0, "81": 99.0}, "repetition_penalty": 1.1},
    ],
    ids=lambda fields: " ".join(k for k in fields if k != "max_tokens") or "plain",
)
def test_every_way_to_ask_answers_as_without(fields: dict[str, Any], http: httpx.Client, drafting: Server) -> None:
    """Whatever decides without chance: the same text and the same numbers."""
    with httpx.Client(base_url=drafting.url, timeout=120) as client:
        for domain in ("a", "b"):
            given = {"domain": domain, "lam": 0.9, **fields}
            plain, drafted = (ask(c, **given) for c in (http, client))
            assert plain.status_code == drafted.status_code == 200, plain.text + drafted.text
            for ours, theirs in zip(drafted.json()["choices"], plain.json()["choices"], strict=True):
                logprobs, expected = ours.pop("logprobs"), theirs.pop("logprobs")
                assert ours == theirs
                if expected is not None:
                    assert logprobs["tokens"] == expected["tokens"]
                    assert logprobs["token_logprobs"][1:] == pytest.approx(expected["token_logprobs"][1:], abs=FLOAT32)
            assert drafted.json()["usage"]["completion_tokens"] == plain.json()["usage"]["completion_tokens"]


def test_streams_and_chats(http: httpx.Client, drafting: Server) -> None:
    """Several tokens may come in one event; together they are the answer."""
    with httpx.Client(base_url=drafting.url, timeout=120) as client:
        assert chat(client, domain="a", max_tokens=30).json()["choices"] == chat(http, domain="a", max_tokens=30).json()["choices"]
        whole = ask(client, domain="a", max_tokens=30).json()["choices"][0]["text"]
        events = ask(client, domain="a", max_tokens=30, stream=True).text
        pieces = [json.loads(line[6:])["choices"][0]["text"] for line in events.splitlines() if line.startswith("data: {")]
        assert "".join(pieces) == whole


def test_seeds_repeat_and_metrics_count(drafting: Server) -> None:
    """A seed gives the same answer twice; drafts and tokens are counted; requests without a domain draft nothing."""
    with httpx.Client(base_url=drafting.url, timeout=120) as client:
        asked: dict[str, Any] = {"domain": "a", "lam": 0.8, "temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 40}
        assert ask(client, **asked).json()["choices"] == ask(client, **asked).json()["choices"]
        drafts, page = "vllm:spec_decode_num_drafts_total", client.get("/metrics").text
        before = metric(page, drafts)
        assert before > 0
        tokens = metric(page, "memdec_generated_tokens_total", mode="none", domain="none")
        ask(client, max_tokens=20, ignore_eos=True)
        page = client.get("/metrics").text
        assert metric(page, drafts) == before
        assert metric(page, "memdec_generated_tokens_total", mode="none", domain="none") == tokens + 20
