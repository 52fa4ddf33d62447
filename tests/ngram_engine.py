"""N-gram memories in the toys' engine: packages to serve, and how far its log-probabilities are from counting."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ngrams import LONGEST, Reference, make_memory
from offline import Row, run
from reference import CODE, hugging_face
from transformers import AutoTokenizer

from memdec.decoders.reading.ngram_index import Vocabulary
from memdec.decoders.reading.tokenizer import token_map_hash
from memdec.server.composite_spec import NgramEntry

TEXTS = [
    CODE * 3,
    "import os\nimport sys\n\n\ndef read(self):\n    return self.x\n",
    "class A:\n    def scale(self, y):\n        return y + 1\n",
    CODE[7:],
]
STRANGE = [[998, 999] * 10]  # a text that shares no token with any other
ORDERS = range(2, LONGEST + 1)
EXACT = 1e-5  # nats


def documents(toys: Path) -> list[list[int]]:
    """A few texts of the toys' tokens."""
    tokenizer = AutoTokenizer.from_pretrained(toys / "base")
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def memory_of(folder: Path, toys: Path, rows: Sequence[Sequence[int]], **record: Any) -> Path:
    """A package of these documents for the toy base."""
    tokenizer = AutoTokenizer.from_pretrained(toys / "base")
    vocabulary = Vocabulary(max(tokenizer.get_vocab().values()) + 1, token_map_hash(tokenizer), 0)
    make_memory(folder, {f"d{i}": row for i, row in enumerate(rows)}, vocabulary, **record)
    return folder


def make_memories(root: Path, toys: Path) -> dict[str, Path]:
    """A memory of every order, named by it, one for domain a, and one of text that no prompt has."""
    made = {f"o{n}": memory_of(root / f"o{n}", toys, documents(toys), order=n) for n in ORDERS}
    return {**made, "a": made["o6"], "strange": memory_of(root / "strange", toys, STRANGE)}


def entries(paths: dict[str, Path]) -> tuple[NgramEntry, ...]:
    """As a composite's spec has them."""
    return tuple(NgramEntry(name, str(path)) for name, path in paths.items())


def off(toys: Path, mix: Sequence[Row], records: list[dict[str, Any]], folder: Path | None = None) -> float:
    """Largest difference of a log-probability of the rows in mode `ngram` from counting.

    What the base says of the same text is Hugging Face's; with a `folder` to work in, plain vLLM's, which is as exact as ours.
    """
    asked = [(row, record) for row, record in zip(mix, records, strict=True) if row[1] is not None and row[3:] == ("ngram",)]
    texts = [record["prompt"] + record["output"] for _, record in asked]
    largest = 0.0
    for ((_, domain, lam, *_mode), record), ids, base in zip(asked, texts, base_logprobs(toys, texts, folder), strict=True):
        name = str(domain)
        reference = Reference(STRANGE if name == "strange" else documents(toys), 0, int(name[1:]) if name[1:].isdigit() else 6)
        ours = record.get("prompt_logprobs", []) + record["logprobs"]
        for at in range(len(ids) - len(ours), len(ids)):
            p = math.exp(base[at - 1])
            expected = math.log((1 - lam) * p + lam * probability(reference, ids[:at], ids[at], p))
            largest = max(largest, abs(ours[at - len(ids) + len(ours)] - expected))
    return largest


def off_both(toys: Path, mix: Sequence[Row], records: list[dict[str, Any]], texts: dict[str, Sequence[Sequence[int]]]) -> float:
    """Largest difference of a log-probability of the rows in mode `both` from Hugging Face's two models and counting.

    `texts`: by domain, the documents of its n-gram memory, of order 6.
    """
    counted = {name: Reference(rows, 0, 6) for name, rows in texts.items()}
    largest = 0.0
    for row, record in zip(mix, records, strict=True):
        if len(row) < 5:
            continue
        _, domain, lam, _, shares = row
        ids, name = record["prompt"] + record["output"], str(domain)
        base, own = (logs(toys / folder, ids) for folder in ("base", f"qwen_{name}"))
        ours = record.get("prompt_logprobs", []) + record["logprobs"]
        for at in range(len(ids) - len(ours), len(ids)):
            p, memory = math.exp(base[at - 1]), math.exp(own[at - 1])
            d, n = (lam * share for share in shares[counted[name].matched(ids[:at])])
            expected = (1 - d - n) * p + d * memory + n * probability(counted[name], ids[:at], ids[at], p)
            largest = max(largest, abs(ours[at - len(ids) + len(ours)] - math.log(expected)))
    return largest


@torch.inference_mode()
def logs(folder: Path, ids: list[int]) -> list[float]:
    """A toy's log-probability of each token after the first; -inf of ids that it doesn't have, which are the base's padding."""
    model, whole = hugging_face(folder, torch.float32), torch.tensor(ids)
    tokens = whole.clamp(max=model.config.vocab_size - 1)  # as the server reads them
    logs = model(tokens[None]).logits[0, :-1].double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    known: list[float] = logs.masked_fill(whole[1:] != tokens[1:], -math.inf).tolist()
    return known


def probability(reference: Reference, context: list[int], token: int, p: float) -> float:
    """The reference's p_ngram of one token, of which the base says p."""
    tail = reference.tail(context)
    for length in range(reference.shortest, reference.matched(context) + 1):
        counts, discount = reference.after[tuple(tail[-length:])], reference.discounts[length - 1]
        p = (max(counts[token] - discount, 0) + discount * len(counts) * p) / sum(counts.values())
    return p


@torch.inference_mode()
def base_logprobs(toys: Path, texts: list[list[int]], folder: Path | None) -> list[list[float]]:
    """Log-probability of each token after the first of each text."""
    if folder is not None:
        rows: list[Row] = [(ids, None, 0.0) for ids in texts]
        records = run(folder, toys, None, rows, sampling={"prompt_logprobs": 1, "max_tokens": 1})["rounds"][0]
        return [record["prompt_logprobs"] for record in records]
    base = hugging_face(toys / "base", torch.float32)
    logs = [base(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for ids in texts]
    return [log.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist() for log, ids in zip(logs, texts, strict=True)]
