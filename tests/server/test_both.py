"""Mode `both`: a decoder and an n-gram memory in one mixture, against Hugging Face and plain counting, and at the HTTP door."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from asking import ask, chat, memory, refused, text
from conftest import Server, metric, start_server, stop_server
from ngram_engine import EXACT, STRANGE, documents, entries, memory_of, off, off_both
from offline import Row, run
from reference import CODE, FLOAT32

from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.weights import fingerprint_model
from memdec.server.checked_models import check_models, with_ngrams
from memdec.server.choice import MemoryChoice
from memdec.server.launch.options import ADMIN_KEY
from memdec.server.model.mixing import mix_both
from memdec.server.model.routing import Beside, Chosen
from memdec.server.retrieval.ngram import SparseRows
from memdec.server.routing.domains import Domain, Ngrams, Shares
from memdec.server.worker.draft_length import drafting
from memdec.server.worker.slots import chosen

FIXED: Shares = ((0.4, 0.6),) * 8
BY_LENGTH: Shares = (*((0.7 - 0.1 * m, 0.1 + 0.11 * m) for m in range(7)), (0.0, 1.0))


def test_the_mixture_equals_the_equation() -> None:
    """Softmax of the mixed logits is the mixture, lambda 1 and shares of 0 and 1 included; padding is the base's alone; the normaliser stays."""
    torch.manual_seed(1)
    base, memory = torch.randn(4, 50) * 8 + 30, torch.randn(4, 45) * 3
    n, r = torch.tensor([0.3, 0.3, 1.0, 0.2]), torch.tensor([0.5, 1.0, 1e-9, 0.25]).double()
    d, tokens = torch.tensor([0.5, 0.7, 0.0, 0.8]).double(), torch.tensor([3, 49, 7, 0])
    s = n * (1 - r).float() * torch.tensor([0.5, 0.5, 1.0, 1.0])
    rows, tokens, s = torch.tensor([0, 0, 2, 3]), tokens, s[[0, 0, 2, 3]]
    found = SparseRows(rows, tokens, s, 1 - n.double() * (1 - r), [])
    for lam in (1e-6, 0.4, 1.0):
        mixed = mix_both(base, memory, found, torch.full((4,), lam), d)
        p, own = base.double().softmax(-1), torch.zeros(4, 50).double()
        own[:, :45] = memory.double().softmax(-1)
        expected = (1 - lam * (d + n * (1 - r)))[:, None] * p + lam * d[:, None] * own
        expected[rows, tokens] += lam * s.double()
        torch.testing.assert_close(mixed.double().softmax(-1), expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(mixed.logsumexp(-1), base.logsumexp(-1))
        assert torch.isfinite(mixed[3]).all() or lam == 1.0


def paths(ngrams: dict[str, Path]) -> dict[str, Path]:
    """An n-gram memory for each decoder's domain, b's of text that no prompt has; and one without a decoder."""
    return {"a": ngrams["a"], "b": ngrams["strange"], "o6": ngrams["o6"]}


def mixed_batch() -> list[Row]:
    """Both kinds of shares, every kind of lambda, contexts never seen; beside them the other modes, of the same decoders and n-grams, too."""
    return [
        (CODE * 4, "a", 0.6, "both", BY_LENGTH),
        (CODE[3:] * 3, "a", 1.0, "both", FIXED),
        ("import os", "a", 1.0, "both", BY_LENGTH),
        (CODE * 2, "b", 0.7, "both", FIXED),
        (CODE[3:] * 3, "a", 0.0, "both", FIXED),
        (CODE * 5, None, 0.0, "none"),
        (CODE[5:] * 4, "a", 0.4, "decoder"),
        (CODE * 3, "o6", 0.7, "ngram"),
        (CODE * 2, "a", 0.5, "ngram"),
        (CODE * 2, "a", 0.5, "knn"),
        (CODE, "b", 0.6, "decoder"),
    ]


def counted(toys: Path) -> dict[str, Any]:
    """By domain, the documents of its n-gram memory."""
    return {"a": documents(toys), "b": STRANGE}


@pytest.mark.engine
def test_in_one_batch_with_every_other_mode(toys: Path, retrieval: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """Prompts in chunks, prompt and generated tokens; whoever has nothing of a memory's is as in plain vLLM, to the last bit."""
    mix = mixed_batch()
    options: dict[str, Any] = {
        "sampling": {"prompt_logprobs": 1},
        "datastores": {"a": retrieval},
        "changed": {"ngrams": entries(paths(ngrams))},
    }
    records = run(tmp_path, toys, "qwen", mix, **options)["rounds"][0]
    assert off_both(toys, mix, records, counted(toys)) <= EXACT
    assert off(toys, mix, records) <= FLOAT32
    plain = run(tmp_path, toys, None, mix, sampling={"prompt_logprobs": 1})["rounds"][0]
    for i in (4, 5):
        assert records[i] == plain[i], mix[i]


@pytest.mark.engine
def test_cached_prompts_preemption_and_several_answers(toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """A KV cache too small for the batch; a second round on the first one's blocks, which are the decoder's own; n samples of one prompt."""
    mix: list[Row] = [
        (CODE * 16, "a", 0.6, "both", BY_LENGTH),
        (CODE * 16, "a", 0.9, "both", FIXED),
        (CODE * 16, "b", 1.0, "both", FIXED),
        (CODE * 16, "a", 0.6, "decoder"),
        (CODE * 16, None, 0.0),
    ]
    result = run(
        tmp_path, toys, "qwen", mix, changed={"ngrams": entries(paths(ngrams))}, rounds=2, num_gpu_blocks_override=8, disable_log_stats=False,
        sampling={"max_tokens": 100, "n": 2, "temperature": 1.0},
    )  # fmt: skip
    assert result["preemptions"] > 0
    for records in result["rounds"]:
        assert off_both(toys, mix, records, counted(toys)) <= EXACT
    assert any(record["cached"] for record in result["rounds"][1][:3])


@pytest.mark.engine
def test_drafts_change_nothing(toys: Path, ngrams: dict[str, Path], tmp_path: Path) -> None:
    """The decoder drafts, the mixture of three verifies: the same greedy tokens, and log-probabilities that are exact."""
    mix: list[Row] = [
        (CODE * 4, "a", 0.9, "both", BY_LENGTH),
        (CODE * 3, "a", 1.0, "both", FIXED),
        (CODE, None, 0.0),
        (CODE * 4, "a", 0.9, "decoder"),
        (CODE * 4, "o6", 0.9, "ngram"),
    ]
    options: dict[str, Any] = {"changed": {"ngrams": entries(paths(ngrams))}, "disable_log_stats": False, "sampling": {"max_tokens": 60}}
    plain = run(tmp_path, toys, "qwen", mix, **options)["rounds"][0]
    drafted = run(tmp_path, toys, "qwen", mix, **options, **DRAFTING)
    assert [r["output"] for r in drafted["rounds"][0]] == [r["output"] for r in plain]
    assert off_both(toys, mix, drafted["rounds"][0], counted(toys)) <= EXACT
    assert all(0 < accepted <= tried for tried, accepted in drafted["drafts"].values()), drafted["drafts"]


DRAFTING: dict[str, Any] = drafting(4, "FixedDrafter")
PAIR: dict[str, Any] = {
    "lambda": 0.8,
    "shares": [list(pair) for pair in BY_LENGTH],
    "better": True,
    "perplexity": {"both": 9.5, "base": 20.0},
}


def fitted(toys: Path, decoder: str, **changed: Any) -> dict[str, Any]:
    """What a package's record says of a decoder beside the toys' base."""
    return {"decoder": Package.open(toys / decoder).revision, "base": fingerprint_model(toys / "base"), **PAIR, **changed}


@pytest.fixture(scope="module")
def packages(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """N-gram packages: `a`, better beside qwen_a; `worse`, the same but not better; `b`, never fitted to any decoder."""
    root, rows = tmp_path_factory.mktemp("packages"), documents(toys)
    memory_of(root / "a", toys, rows, beside=[fitted(toys, "qwen_a")], sources=True)
    memory_of(root / "worse", toys, rows, beside=[fitted(toys, "qwen_a", better=False)], sources=True)
    memory_of(root / "b", toys, rows, **{"lambda": 0.7})
    return root


def domain_with(toys: Path, decoder: str, package: Path) -> Domain:
    """A domain of this decoder and this n-gram memory, as a server's start finds it."""
    models = check_models(str(toys / "base"), [f"a={toys / decoder}"])
    return with_ngrams(models, [f"a={package}"]).domains.find("a")


def test_the_default_is_both_where_that_was_better_beside_exactly_this_decoder(toys: Path, packages: Path) -> None:
    """Otherwise it stays the decoder, and both can be asked for as fitted, or with a share of one's own."""
    domain = domain_with(toys, "qwen_a", packages / "a")
    assert domain.modes == ("both", "decoder", "ngram", "none")
    assert domain.lambda_of("both") == 0.8 and domain.shares_of(None) == BY_LENGTH and domain.is_tuned
    assert Domain.of(json.loads(json.dumps(asdict(domain)))) == domain
    worse = domain_with(toys, "qwen_a", packages / "worse")
    assert worse.modes == ("decoder", "ngram", "both", "none") and worse.shares_of(None) == BY_LENGTH
    for foreign in (domain_with(toys, "qwen_b", packages / "a"), domain_with(toys, "qwen_a", packages / "b")):
        assert foreign.modes == ("decoder", "ngram", "both", "none") and foreign.both is None
        assert foreign.lambda_of("both") is None and foreign.shares_of(None) is None
        assert foreign.shares_of(0.25) == ((0.75, 0.25),) * 8
    assert NgramMemory.open(packages / "a").revision == NgramMemory.open(packages / "worse").revision, "the memory is the same"


def test_shares_of_a_memory_with_weights_by_length() -> None:
    """A share of the request's is of p_ngram as mode `ngram` mixes it in."""
    ngrams = Ngrams("", 0.5, 8, 1, 1, "r", True, False, {}, weights=(0.0, 0.5, *[1.0] * 5))
    assert ngrams.shared(0.4)[:3] == ((0.6, 0.4), (0.6, 0.0), (0.6, 0.2)) and ngrams.shared(0.4)[7] == (0.6, 0.4)


def test_a_choice_survives_its_way_to_the_worker() -> None:
    """As extra_args, which vLLM encodes; the worker finds both memories, by slot or by name."""
    choice = MemoryChoice("both", "a", 0.5, shares=FIXED)
    params = SimpleNamespace(extra_args={**json.loads(json.dumps(choice.to_extra_args())), "memory_slot": 3, "memory_beside": 9})
    read = MemoryChoice.of(params)
    assert read == replace(choice, slot=3, beside=9)
    assert chosen(read, {}) == Chosen(3, 0.5, Beside(9, FIXED)) and chosen(read, {}).slots == (3, 9)
    assert chosen(choice, {("decoder", "a"): 1, ("ngram", "a"): 4}).slots == (1, 4)
    assert choice.label == ("both", "a") and choice.decoded and not replace(choice, lam=0.0).decoded


ADMIN = {"Authorization": "Bearer the admin's"}


@pytest.fixture(scope="module")
def paired(toys: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose domain a was fitted, whose domain b was not, and which replays all decoder requests; its domains may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_KEY, ADMIN["Authorization"].removeprefix("Bearer "))
        running = start_server(
            tmp_path_factory.mktemp("paired") / "log.txt", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--decoder", f"b={toys / 'qwen_b'}",
            "--ngram", f"a={packages / 'a'}", "--ngram", f"b={packages / 'b'}", "--baseline-sample-rate", "1", "--dtype", "float32",
            "--enable-domain-updates", "--domain-root", str(packages), "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20),
        )  # fmt: skip
    yield running
    stop_server(running)


@pytest.fixture
def http(paired: Server) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=paired.url, timeout=120) as client:
        yield client


def page_when(http: httpx.Client, name: str, least: float, **labels: str) -> str:
    """The metrics page, as soon as a metric has reached a value."""
    deadline = time.monotonic() + 60
    while metric(page := http.get("/metrics").text, name, **labels) < least and time.monotonic() < deadline:
        time.sleep(0.2)
    return page


@pytest.mark.engine
def test_at_the_door(http: httpx.Client, toys: Path) -> None:
    """By default where it was better; header, body, chats, streams, n and metrics; a share of one's own elsewhere."""
    row = documents(toys)[0]
    asked: dict[str, Any] = {"prompt": row[: len(row) // 2], "max_tokens": 20, "ignore_eos": True}
    plain = ask(http, domain="a", **asked)
    assert memory(plain) == {"domain": "a", "mode": "both", "lambda": "0.8"}
    assert text(plain) == text(ask(http, {"X-Domain": "a", "X-Memory": "both"}, **asked))
    others = [text(ask(http, domain="a", memory=mode, lam=0.8, **asked)) for mode in ("decoder", "ngram")]
    assert text(plain) not in others
    assert text(ask(http, domain="a", memory="both", ngram_share=0, lam=0.8, **asked)) == others[0]
    assert text(ask(http, domain="a", memory="both", ngram_share=1, lam=0.8, **asked)) == others[1]
    own = ask(http, domain="b", memory="both", ngram_share=0.5, lam=0.6, **asked)
    assert memory(own) == {"domain": "b", "mode": "both", "lambda": "0.6"}
    assert memory(ask(http, domain="b", **asked))["mode"] == "decoder"
    assert memory(chat(http, domain="a"))["mode"] == "both"
    stream = ask(http, domain="a", stream=True, **asked).text
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in stream.splitlines() if line.startswith("data: {")) == text(plain)
    twice = [ask(http, domain="a", n=2, temperature=1.0, seed=3, **asked).json()["choices"] for _ in range(2)]
    assert twice[0] == twice[1] and len(twice[0]) == 2
    assert memory(ask(http, domain="a", lam=0, **asked))["mode"] == "none"
    entry = http.get("/v1/domains/a").json()
    assert entry["modes"] == ["both", "decoder", "ngram", "none"] and entry["lambda"] == 0.8 and entry["lambda_tuned"]
    assert entry["both"]["perplexity"] == PAIR["perplexity"] and entry["both"]["ngram_shares"][-1] == 1.0 and entry["both"]["better"]
    assert http.get("/v1/domains/b").json()["both"] is None
    page = page_when(http, "memdec_shadows_total", 3, mode="decoder", domain="a", outcome="done")
    assert metric(page, "memdec_generated_tokens_total", mode="both", domain="a") >= 100
    assert metric(page, "memdec_requests_total", mode="both", domain="a") >= 5
    assert metric(page, "memdec_shadows_total", outcome="failed") == 0


@pytest.mark.engine
def test_what_is_refused(http: httpx.Client) -> None:
    """By name: no split that anybody measured or named, shares without the mode, values out of range, sources."""
    message = refused(ask(http, domain="b", memory="both", lam=0.5), 400, "memory")
    assert "ngram_share" in message and "--beside" in message
    refused(ask(http, domain="b", memory="both", ngram_share=0.5), 400, "lambda")
    for value in (-0.1, 1.5, "0.5", True, [0.5]):
        refused(ask(http, domain="a", memory="both", ngram_share=value), 400, "ngram_share")
    for fields in ({"domain": "a", "memory": "decoder"}, {"domain": "b"}, {"domain": "a", "lam": 0}, {}):
        refused(ask(http, ngram_share=0.5, **fields), 400, "ngram_share")
    refused(ask(http, domain="a", memory_sources=True), 400, "memory_sources")
    assert text(ask(http, domain="a", memory="ngram", memory_sources=True)) is not None
    refused(ask(http, domain="a", memory="both", use_beam_search=True, n=2), 400, "use_beam_search")
    assert "memory_beside" in refused(ask(http, domain="a", vllm_xargs={"memory_beside": 4}), 400)


@pytest.mark.engine
def test_memories_that_come_and_go(http: httpx.Client, packages: Path, toys: Path) -> None:
    """What was fitted comes with the package, and goes with either of the two; a request in flight keeps both slots."""

    def load(name: str, path: Path) -> None:
        answer = http.post("/v1/domains", json={"name": name, "path": str(path)}, headers=ADMIN)
        assert answer.status_code in (200, 201), answer.text

    def modes() -> list[str]:
        found: list[str] = http.get("/v1/domains/new").json()["modes"]
        return found

    shutil.copytree(toys / "qwen_a", packages / "decoder")
    load("new", packages / "decoder")
    assert modes() == ["decoder", "none"]
    load("new", packages / "a")
    assert modes()[0] == "both"
    asked: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    assert text(ask(http, domain="new", **asked)) == text(ask(http, domain="a", **asked))
    load("new", packages / "worse")  # the same memory: what was measured of it is another
    assert modes()[0] == "decoder" and memory(ask(http, domain="new", memory="both", **asked))["mode"] == "both"
    load("new", packages / "b")
    assert modes()[0] == "decoder"
    refused(ask(http, domain="new", memory="both", lam=0.5), 400, "memory")
    assert http.delete("/v1/domains/new", headers=ADMIN).status_code == 200
    deadline = time.monotonic() + 60
    while http.get("/v1/domains").json()["slots"]["draining"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert http.get("/v1/domains").json()["slots"] == {"total": 3, "free": 1, "draining": []}
