"""N-gram memories at the HTTP door, on a server without any decoder: modes, sources, drafts, metrics, and domains that come and go."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import ask, chat, memory, refused, text
from conftest import Server, metric, start_server, stop_server
from ngram_engine import TEXTS, documents, memory_of

from memdec.decoders.reading.ngram_record import NAME
from memdec.server.checked_models import Models, check_models, with_ngrams
from memdec.server.errors import StartupError
from memdec.server.launch.options import ADMIN_KEY

ADMIN = {"Authorization": "Bearer the admin's"}


@pytest.fixture(scope="module")
def packages(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages `a`, `named` (with sources) and `other`."""
    root, rows = tmp_path_factory.mktemp("ngrams"), documents(toys)
    memory_of(root / "a", toys, rows, **{"lambda": 0.7})
    memory_of(root / "named", toys, rows, sources=True)
    memory_of(root / "other", toys, rows[::-1], order=3)
    return root


@pytest.fixture(scope="module")
def counted(toys: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two n-gram memories and no decoder, whose domains may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_KEY, ADMIN["Authorization"].removeprefix("Bearer "))
        running = start_server(
            tmp_path_factory.mktemp("counted") / "log.txt", str(toys / "base"), "--ngram", f"a={packages / 'a'}", "--ngram", f"named={packages / 'named'}",
            "--enable-domain-updates", "--domain-root", str(packages), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
            "--kv-cache-memory-bytes", str(128 << 20), "--baseline-sample-rate", "0",
        )  # fmt: skip
    yield running
    stop_server(running)


@pytest.fixture(scope="module")
def start(toys: Path) -> list[int]:
    """Half of the memories' first document."""
    row = documents(toys)[0]
    return row[: len(row) // 2]


@pytest.fixture
def http(counted: Server) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=counted.url, timeout=120) as client:
        yield client


@pytest.mark.engine
def test_a_domain_without_a_decoder_is_asked_for_its_n_grams(http: httpx.Client, start: list[int]) -> None:
    """By default, with its own lambda; what it hasn't is refused by name; lambda 0 is the base."""
    asked: dict[str, Any] = {"prompt": start, "max_tokens": 20, "ignore_eos": True}
    plain = ask(http, domain="a", **asked)
    assert memory(plain) == {"domain": "a", "mode": "ngram", "lambda": "0.7"}
    assert text(ask(http, {"X-Domain": "a", "X-Memory": "ngram", "X-Lambda": "0.7"}, **asked)) == text(plain)
    assert text(plain) != text(ask(http, **asked)) == text(ask(http, domain="a", lam=0, **asked))
    assert "no decoder is loaded for domain 'a'. Use ngram or none." in refused(ask(http, domain="a", memory="decoder"), 400, "memory")
    entry = http.get("/v1/domains/a").json()
    assert entry["modes"] == ["ngram", "none"] and entry["lambda"] == 0.7
    assert (
        entry["ngram"].items()
        >= {"order": 6, "lambda": 0.7, "lambda_tuned": False, "sources": False, "revision": entry["revision"]}.items()
    )
    assert entry["ngram"]["tokens"] > 20
    stream = ask(http, domain="a", stream=True, **asked).text
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in stream.splitlines() if line.startswith("data: {")) == text(plain)
    twice = ask(http, domain="a", n=2, **asked, temperature=1.0, seed=3).json()["choices"]
    assert twice == ask(http, domain="a", n=2, **asked, temperature=1.0, seed=3).json()["choices"]
    page = http.get("/metrics").text
    assert metric(page, "memdec_generated_tokens_total", mode="ngram", domain="a") >= 60
    assert metric(page, "memdec_step_seconds_total", part="ngram") > 0
    assert metric(page, "memdec_drafted_tokens_total", drafter="ngram") >= metric(page, "memdec_accepted_tokens_total", drafter="ngram") > 0


@pytest.mark.engine
def test_sources(http: httpx.Client, toys: Path, start: list[int]) -> None:
    """Each names a place where the text before the token stands; streams and chats have them too; elsewhere the field is refused."""
    rows = documents(toys)
    asked: dict[str, Any] = {"prompt": start, "domain": "named", "lam": 0.9, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    answer = ask(http, memory_sources=True, **asked)
    (choice,) = answer.json()["choices"]
    assert text(answer) == text(ask(http, **asked)) and choice["logprobs"] is None
    assert "memory_sources" not in ask(http, **asked).json()["choices"][0]
    assert choice["memory_sources"], "the memory has this text"
    whole = [*start, *choice["token_ids"]]
    first = len(whole) - len(choice["token_ids"])
    for source in choice["memory_sources"]:
        assert whole[first + source["index"]] == source["token_id"] and 1 <= len(source["occurrences"]) <= 3
        for place in source["occurrences"]:
            row, offset, end = rows[int(place["document"][1:])], place["offset"], first + source["index"]
            assert row[offset : offset + source["matched"]] == whole[end - source["matched"] : end]
    stream = ask(http, memory_sources=True, stream=True, **asked).text
    events = [json.loads(line[6:])["choices"][0] for line in stream.splitlines() if line.startswith("data: {")]
    assert [e["memory_sources"] for e in events if "memory_sources" in e] == [choice["memory_sources"]]
    assert "memory_sources" in chat(http, domain="named", memory_sources=True, max_tokens=4).json()["choices"][0]
    pair = ask(http, memory_sources=True, n=2, temperature=1.0, **asked).json()["choices"]
    assert all("memory_sources" in one for one in pair)
    for fields in ({"domain": "a"}, {"domain": "named", "memory": "none"}, {"domain": "named", "lam": 0.0}, {}):
        refused(ask(http, memory_sources=True, **fields), 400, "memory_sources")
    refused(ask(http, domain="named", memory_sources="yes"), 400, "memory_sources")
    body = {"model": "base", "input": "hello", "domain": "named", "memory_sources": True}
    refused(http.post("/v1/responses", json=body), 400, "memory_sources")


def load(http: httpx.Client, name: str, path: str | Path) -> httpx.Response:
    """POST /v1/domains with the admin key."""
    return http.post("/v1/domains", json={"name": name, "path": str(path)}, headers=ADMIN)


@pytest.mark.engine
def test_memories_come_and_go(http: httpx.Client, packages: Path, toys: Path, start: list[int]) -> None:
    """A new domain, its next revision, and its end; what can't be loaded leaves all as it was, and says why in a line."""
    asked: dict[str, Any] = {"prompt": start, "max_tokens": 20, "ignore_eos": True, "lam": 0.7}
    created = load(http, "new", "a")
    assert created.status_code == 201 and created.json() == http.get("/v1/domains/new").json()
    first = text(ask(http, domain="new", **asked))
    assert first == text(ask(http, domain="a", **asked))
    replaced = load(http, "new", packages / "other")
    assert replaced.status_code == 200 and replaced.json()["ngram"]["order"] == 3
    assert load(http, "new", packages / "other").status_code == 200
    assert text(ask(http, domain="new", **asked)) != text(ask(http, domain="a", **{**asked, "lam": 0}))
    deadline = time.monotonic() + 60
    while (slots := http.get("/v1/domains").json()["slots"])["draining"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert slots == {"total": 0, "free": 0, "draining": []}
    broken = packages / "broken"
    shutil.copytree(packages / "a", broken)
    next(broken.glob("shard-0/*tokens*")).write_bytes(b"\0")
    assert "truncated" in refused(load(http, "new", broken), 400)
    shutil.copytree(toys / "qwen_a", packages / "decoder")
    assert "no decoder" in refused(load(http, "new", packages / "decoder"), 400)
    assert http.get("/v1/domains/new").json() == replaced.json()
    assert http.delete("/v1/domains/new", headers=ADMIN).status_code == 200
    refused(ask(http, domain="new"), 404, "domain")
    assert metric(http.get("/metrics").text, "memdec_domain_info", domain="new") == 0


@pytest.fixture(scope="module")
def models(toys: Path) -> Models:
    """Base and a decoder, checked."""
    return check_models(str(toys / "base"), [f"a={toys / 'qwen_a'}"])


def test_n_grams_join_a_decoder_or_stand_alone(models: Models, packages: Path) -> None:
    """Slots, modes and the spec that workers read."""
    both = with_ngrams(models, [f"a={packages / 'a'}", f"c={packages / 'other'}"])
    assert both.domains.find("a").modes == ("decoder", "ngram", "both", "none") and both.domains.find("c").modes == ("ngram", "none")
    assert both.spec.first_slots == {("decoder", "a"): 1, ("ngram", "a"): 2, ("ngram", "c"): 3}
    assert both.domains.find("a").lambda_of("ngram") == 0.7


def test_a_folder_of_text_is_indexed_once(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in the cache, from where the second start has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text(TEXTS[0] * 4)
    first, second = (with_ngrams(models, [f"notes={tmp_path / 'notes'}"]).domains.find("notes") for _ in range(2))
    assert first == second and first.ngrams is not None and first.ngrams.tokens > 20
    assert Path(first.path).is_relative_to(tmp_path / "cache")


def test_packages_that_cannot_be_served(models: Models, packages: Path, toys: Path, tmp_path: Path) -> None:
    """Truncated, another tokenizer's, no package at all, twice the same name: one line that names it."""

    def message(*values: str) -> str:
        with pytest.raises(StartupError) as caught:
            with_ngrams(models, values)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "given twice" in message(f"a={packages / 'a'}", f"a={packages / 'other'}")
    (tmp_path / "nothing").mkdir()
    assert "no file in it" in message(f"a={tmp_path / 'nothing'}")
    shutil.copytree(packages / "a", tmp_path / "foreign")
    record = json.loads((tmp_path / "foreign" / NAME).read_text())
    (tmp_path / "foreign" / NAME).write_text(json.dumps({**record, "token_map": "f" * 16}))
    assert "another tokenizer" in message(f"a={tmp_path / 'foreign'}")
    shutil.copytree(packages / "a", tmp_path / "short")
    next((tmp_path / "short").glob("shard-0/*tokens*")).write_bytes(b"\0")
    assert "truncated" in message(f"a={tmp_path / 'short'}")
