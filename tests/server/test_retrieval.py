"""kNN-LM and RAG as modes of a request: against slow exact references, and at the HTTP door."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from asking import ask, memory, refused, text
from offline import run
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from memdec.decoders.reading.passages import Passages
from memdec.decoders.reading.retrieval import NAME, RetrievalPackage
from memdec.server.checked_models import Models, check_models, with_datastores
from memdec.server.errors import StartupError

pytestmark = pytest.mark.engine

CODE = "def scale(self, x):\n    return x + 1\n"


@torch.inference_mode()
def reference(toys: Path, store: RetrievalPackage, ids: list[int], domain: str | None, lam: float, mode: str) -> torch.Tensor:
    """Log-probabilities of the kNN-LM, or the mixture, at every position, float64 [tokens, V]: one distance after the other."""
    out = AutoModelForCausalLM.from_pretrained(toys / "base")(torch.tensor([ids]), output_hidden_states=True)
    base = out.logits[0].double().softmax(-1)
    if domain is None:
        alone: torch.Tensor = base.log()
        return alone
    other = torch.zeros_like(base)
    if mode == "decoder":
        decoder = AutoModelForCausalLM.from_pretrained(toys / f"qwen_{domain}")
        logits = decoder(torch.tensor([ids]).clamp(max=decoder.config.vocab_size - 1)).logits[0].double()
        other[:, : logits.shape[-1]] = logits.softmax(-1)[:, : base.shape[-1]]
    else:
        opened = store.datastore()
        keys = np.stack([opened.index.reconstruct(i) for i in range(opened.index.ntotal)]).astype(np.float64)
        for row, query in enumerate(out.hidden_states[-1][0].double().numpy()):
            distances = ((keys - query) ** 2).sum(1)
            nearest = np.argsort(distances, kind="stable")[: store.neighbours]
            weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / store.tau)
            np.add.at(other[row].numpy(), np.asarray(opened.values[nearest], np.int64), weights / weights.sum())
    mixed: torch.Tensor = (lam * other + (1 - lam) * base).log()
    return mixed


def test_knn_in_a_mixed_batch_equals_the_slow_way(toys: Path, retrieval: Path, tmp_path: Path) -> None:
    """kNN-LM, decoders and the base in one batch, prompts in chunks, generated and prompt tokens."""
    mix: list[tuple[str, str | None, float, str]] = [
        (CODE * 6, "a", 0.5, "knn"), (CODE * 3, None, 0.0, "none"), (CODE[5:] * 5, "a", 0.3, "decoder"), (CODE[9:] * 4, "b", 0.6, "decoder"),
        ("import os", "a", 1.0, "knn"), (CODE[3:] * 3, "a", 0.0, "knn"),
    ]  # fmt: skip
    result = run(tmp_path, toys, "qwen", mix, datastores={"a": retrieval}, sampling={"prompt_logprobs": 1})
    store = RetrievalPackage.open(retrieval, toys / "base")
    for (_, domain, lam, mode), record in zip(mix, result["rounds"][0], strict=True):
        ids = record["prompt"] + record["output"]
        expected = reference(toys, store, ids, domain, lam, mode)
        ours = record["prompt_logprobs"] + record["logprobs"]
        theirs = [expected[i - 1, ids[i]].item() for i in range(1, len(ids))]
        seen = [(a, b) for a, b in zip(ours, theirs, strict=True) if b > -60]  # lambda 1: tokens that no neighbour has
        assert len(seen) > len(ours) // 8
        np.testing.assert_allclose([a for a, _ in seen], [b for _, b in seen], atol=2e-4)


def test_modes_over_http(http: httpx.Client) -> None:
    """Each mode says what it used; lambda is tuned unless given; a domain without a datastore refuses."""
    tuned = http.get("/v1/domains/a").json()["datastore"]["lambda"]
    knn = ask(http, domain="a", memory="knn")
    assert memory(knn) == {"domain": "a", "mode": "knn", "lambda": f"{tuned:g}"}
    assert memory(ask(http, {"X-Domain": "a", "X-Memory": "knn", "X-Lambda": "0.25"}))["lambda"] == "0.25"
    assert text(ask(http, domain="a", memory="knn", lam=0)) == text(ask(http))
    assert memory(ask(http, domain="a", memory="rag")) == {"domain": "a", "mode": "rag"}
    assert http.get("/v1/domains/a").json()["modes"] == ["decoder", "knn", "rag", "none"]
    assert http.get("/v1/domains/b").json()["modes"] == ["decoder", "none"]
    assert "no datastore" in refused(ask(http, domain="b", memory="knn"), 400, "memory")
    assert "no meaning" in refused(ask(http, domain="a", memory="rag", lam=0.5), 400, "lambda")


@pytest.mark.parametrize(("fields", "param"), [
    ({"rag_stride": 0}, "rag_stride"), ({"rag_stride": "4"}, "rag_stride"), ({"rag_stride": True}, "rag_stride"), ({"rag_stride": 4, "memory": "knn"}, "rag_stride"), ({"rag_stride": 10**30}, "rag_stride"), ({"prompt": [[]]}, "prompt"),
    ({"rag_stride": 4, "n": 2, "temperature": 1}, "rag_stride"), ({"rag_stride": 4, "presence_penalty": 1}, "rag_stride"), ({"rag_stride": 4, "echo": True, "logprobs": 1}, "rag_stride"),
    ({"rag_stride": 4, "response_format": {"type": "json_object"}}, "rag_stride"),
])  # fmt: skip
def test_strides_that_cannot_be(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    """Refused by name, streamed or not."""
    for stream in (False, True):
        refused(ask(http, **{"domain": "a", "memory": "rag", "stream": stream, **fields}), 400, param)


def passage_before(toys: Path, retrieval: Path, ids: list[int]) -> list[int]:
    """The passage that BM25 finds for a prompt, by the package's own options."""
    store = RetrievalPackage.open(retrieval, toys / "base")
    found = Passages.open(retrieval, AutoTokenizer.from_pretrained(toys / "base")).best([np.array(ids[-store.rag.query :])])
    return [int(i) for i in found[0]]


def test_rag_is_the_base_on_the_longer_prompt(http: httpx.Client, toys: Path, retrieval: Path) -> None:
    """Same tokens as if the client had put the passage there; usage counts it, echo leaves it out, and the cache knows it."""
    ids = http.post("/tokenize", json={"model": "base", "prompt": CODE}).json()["tokens"]
    passage = passage_before(toys, retrieval, ids)
    assert len(passage) == 32
    by_hand = ask(http, prompt=passage + ids, echo=True, logprobs=1)
    answer = ask(http, prompt=CODE, domain="a", memory="rag", echo=True, logprobs=1)
    assert text(answer).startswith(CODE)
    assert answer.json()["usage"] == {**by_hand.json()["usage"], "prompt_tokens_details": answer.json()["usage"]["prompt_tokens_details"]}
    ours, theirs = (a.json()["choices"][0]["logprobs"]["token_logprobs"] for a in (answer, by_hand))
    assert ours[0] is None and ours[1:] == pytest.approx(theirs[33:], abs=1e-5)
    plain = ask(http, prompt=CODE, domain="a", memory="rag")
    assert text(plain) == text(answer)[len(CODE) :]
    assert plain.json()["usage"]["prompt_tokens"] == len(ids) + 32


def test_a_passage_gives_way_to_the_context(http: httpx.Client) -> None:
    """A prompt that fills the context gets as much of a passage as there is room for, or none."""
    for length, added in ((490, 14), (504, 0)):
        answer = ask(http, prompt=[5 + i % 900 for i in range(length)], domain="a", memory="rag")
        assert answer.json()["usage"]["prompt_tokens"] == length + added


def test_a_stride_is_a_chain_of_requests(http: httpx.Client, toys: Path, retrieval: Path) -> None:
    """Every four tokens a new passage before all text so far: the same tokens as doing that by hand, streamed or not."""
    ids = list(http.post("/tokenize", json={"model": "base", "prompt": CODE}).json()["tokens"])
    fields: dict[str, Any] = {"domain": "a", "memory": "rag", "rag_stride": 4, "max_tokens": 10, "ignore_eos": True, "logprobs": 1}
    answer = ask(http, prompt=ids, return_token_ids=True, **fields)
    made: list[int] = []
    for tokens in (4, 4, 2):
        part = ask(
            http, prompt=passage_before(toys, retrieval, ids + made) + ids + made, max_tokens=tokens, ignore_eos=True, return_token_ids=True
        )
        made += part.json()["choices"][0]["token_ids"]
    choice = answer.json()["choices"][0]
    assert choice["token_ids"] == made and choice["finish_reason"] == "length" and len(choice["logprobs"]["tokens"]) == 10
    assert answer.json()["usage"]["prompt_tokens"] == len(ids) + 3 * 32
    with http.stream(
        "POST",
        "/v1/completions",
        json={"model": "base", "prompt": ids, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **fields},
    ) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == text(answer)
    assert events[-1]["usage"]["total_tokens"] == len(ids) + 3 * 32 + 10
    stopped = ask(http, prompt=ids, stop=[text(answer)[3:7]], **{**fields, "logprobs": None})
    assert text(stopped) == text(answer)[:3] and stopped.json()["choices"][0]["finish_reason"] == "stop"


def test_rag_in_a_chat(sdk: OpenAI) -> None:
    """The passage goes before the whole conversation."""
    messages: Any = [{"role": "user", "content": "hello"}]
    plain, rag = (
        sdk.chat.completions.create(model="base", messages=messages, max_tokens=4, extra_body=body)  # type: ignore[arg-type]
        for body in ({}, {"domain": "a", "memory": "rag"})
    )
    assert rag.usage is not None and plain.usage is not None
    assert rag.usage.prompt_tokens == plain.usage.prompt_tokens + 32
    unlimited = sdk.chat.completions.create(
        model="base", messages=messages, extra_body={"domain": "a", "memory": "rag", "ignore_eos": True}
    )  # type: ignore[arg-type]
    assert unlimited.usage is not None and unlimited.usage.prompt_tokens == rag.usage.prompt_tokens
    assert unlimited.usage.total_tokens == 512  # the answer gave way to the passage, not the passage to the answer


@pytest.fixture
def models(toys: Path) -> Models:
    """Base and a decoder, checked."""
    return check_models(str(toys / "base"), [f"a={toys / 'qwen_a'}"])


def test_broken_datastores(models: Models, toys: Path, retrieval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncated, changed, missing, another base's, no datastore at all: named in one line; served without only if asked to."""

    def message(path: Path, name: str = "a") -> str:
        with pytest.raises(StartupError) as caught:
            with_datastores(models, [f"{name}={path}"], False)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert with_datastores(models, [f"a={retrieval}"], False).domains.find("a").datastore is not None
    assert "no --decoder is called" in message(retrieval, "b")
    assert "no such folder" in message(tmp_path / "nowhere")
    assert "memdec retrieval" in message(toys / "base")
    with pytest.raises(StartupError, match="given twice"):
        with_datastores(models, [f"a={retrieval}"] * 2, False)
    foreign = check_models(str(toys / "qwen_b"), [f"a={toys / 'qwen_a'}"])
    with pytest.raises(StartupError, match="another base"):
        with_datastores(foreign, [f"a={retrieval}"], False)

    broken = tmp_path / "broken"
    for file, damage, expected in (
        ("index.faiss", lambda b: b[:-1], "truncated"),
        ("values.npy", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "damaged"),
        ("passages.npy", None, "missing"),
        (NAME, lambda b: b[: len(b) // 2], "JSON"),
        (NAME, lambda b: b.replace(b'"tau": ', b'"tao": '), "damaged"),
        (NAME, lambda b: b.replace(b"final hidden state of the base", b"input of the last MLP"), "keys are"),
    ):
        shutil.copytree(retrieval, broken)
        if damage is None:
            (broken / file).unlink()
        else:
            (broken / file).write_bytes(damage((broken / file).read_bytes()))
        assert expected in message(broken), file
        without = with_datastores(models, [f"a={broken}"], True)
        assert without.domains.find("a").datastore is None
        assert "serving without it" in capsys.readouterr().err
        shutil.rmtree(broken)
