"""Domains that come, change and go while requests run: against Hugging Face's computation of every revision's mixture."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from asking import ABSENT, ask, refused, text
from conftest import ROOT, Server, metric, start_server, stop_server
from reference import greedy, hugging_face
from safetensors.torch import load_file, save_file
from toys import QWEN_ROWS, qwen

from memdec.decoders.reading.weights import fingerprint_model
from memdec.server.engine.settings import UpdateOptions
from memdec.server.errors import StartupError
from memdec.server.launch.options import ADMIN_KEY, OURS, check, parse
from memdec.server.naming import packages_in

pytestmark = pytest.mark.slow

ADMIN, USER = {"Authorization": "Bearer the admin's"}, {"Authorization": "Bearer a user's"}
VERSIONS = [f"v{i}" for i in range(1, 7)]
SLOTS = 4
TOKENS = 10
REQUESTS = 1000
PREFIXES = [[100 + (salt * 137 + i * i * 11 + i * salt) % 900 for i in range(300)] for salt in (1, 2)]  # two cache blocks and more
PROMPTS = [[*prefix, 200 + i] for prefix in PREFIXES for i in range(2)] + [[300, 301, 302], [400, 401]]


@pytest.fixture(scope="module")
def folder(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of decoder packages: a and b, which the server starts with, and hidden revisions v1 to v6."""
    root = tmp_path_factory.mktemp("packages")
    for name, source in {"a": "qwen_a", "b": "qwen_b", ".gpt": "gpt_a"}.items():
        shutil.copytree(toys / source, root / name)
        (root / name / "memory_decoder.json").write_text(json.dumps({"format": 1, "domain": name}))
    for seed, name in enumerate(VERSIONS, 31):
        shutil.copytree(root / "a", root / f".{name}")
        qwen(seed, QWEN_ROWS, hidden=64, layers=2, heads=2, spread=0.2).save_pretrained(root / f".{name}")
    return root


@pytest.fixture(scope="module")
def changing(toys: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose domains may change, and which drafts: a and b from the folder, which is also where decoders may be loaded from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_KEY, ADMIN["Authorization"].removeprefix("Bearer "))
        patch.setenv("OMP_NUM_THREADS", "1")  # enough for toys, and threads that wait for each other are slow on a busy machine
        running = start_server(
            tmp_path_factory.mktemp("changing") / "log.txt", str(toys / "base"), "--decoder-dir", str(folder), "--enable-domain-updates",
            "--max-decoders", str(SLOTS), "--api-key", USER["Authorization"].removeprefix("Bearer "), "--dtype", "float32",
            "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20),
        )  # fmt: skip
    yield running
    stop_server(running)


@pytest.fixture
def http(changing: Server) -> Iterator[httpx.Client]:
    """A user's client of that server; after the test it has domains a and b as they were."""
    with httpx.Client(base_url=changing.url, timeout=120, headers=USER) as client:
        yield client
        for name in {d["name"] for d in client.get("/v1/domains").json()["data"]} - {"a", "b"}:
            client.delete(f"/v1/domains/{name}", headers=ADMIN)
        settle(client)
        for name in "ab":
            assert load(client, name, name).status_code in (200, 201)
        settle(client)


def load(http: httpx.Client, name: str, path: str | Path, **more: Any) -> httpx.Response:
    """POST /v1/domains with the admin key."""
    return http.post("/v1/domains", json={"name": name, "path": str(path), **more}, headers=ADMIN)


def settle(http: httpx.Client) -> dict[str, Any]:
    """Wait until nothing drains any more; returns the slots."""
    deadline = time.monotonic() + 60
    while (slots := http.get("/v1/domains").json()["slots"])["draining"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not slots["draining"]
    return dict(slots)


def names(http: httpx.Client) -> list[str]:
    """The domains there are now."""
    return sorted(d["name"] for d in http.get("/v1/domains").json()["data"])


def aliases(http: httpx.Client) -> list[str]:
    """The models there are now."""
    return sorted(m["id"] for m in http.get("/v1/models").json()["data"])


@pytest.fixture(scope="module")
def expected(toys: Path, folder: Path) -> dict[str, list[list[int]]]:
    """Package -> greedy tokens after each prompt, the slow and obvious way: no cache, no batch, Hugging Face alone."""
    torch.set_num_threads(1)
    base = hugging_face(toys / "base", torch.float32)
    packages = {"base": None, "a": folder / "a", "b": folder / "b", **{v: folder / f".{v}" for v in VERSIONS}}
    found = {}
    for name, path in packages.items():
        decoder = hugging_face(path, torch.float32) if path is not None else None
        found[name] = [greedy(base, decoder, prompt, TOKENS) for prompt in PROMPTS]
    for i in range(len(PROMPTS)):
        assert len({tuple(tokens[i]) for tokens in found.values()}) == len(found), "every revision answers in its own way"
    return found


def tokens(http: httpx.Client, prompt: list[int], **fields: Any) -> list[int]:
    """The tokens of a greedy answer."""
    answer = ask(http, prompt=prompt, max_tokens=TOKENS, ignore_eos=True, return_token_ids=True, **fields)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def test_a_domain_comes_changes_and_goes(http: httpx.Client, folder: Path, expected: dict[str, list[list[int]]]) -> None:
    """Its answers are its decoder's at each stage; list, aliases, metrics and errors follow."""
    assert names(http) == ["a", "b"]
    assert tokens(http, PROMPTS[0], domain="a") == expected["a"][0]
    created = load(http, "new", ".v1")
    assert created.status_code == 201
    assert created.json() == http.get("/v1/domains/new").json()
    assert created.json()["revision"] == fingerprint_model(folder / ".v1")
    assert names(http) == ["a", "b", "new"] and aliases(http)[-1] == "base:new"
    assert [tokens(http, p, domain="new") for p in PROMPTS] == expected["v1"]
    assert tokens(http, PROMPTS[0], model="base:new") == expected["v1"][0]

    replaced = load(http, "new", folder / ".v2")
    assert replaced.status_code == 200 and replaced.json()["revision"] == fingerprint_model(folder / ".v2")
    assert [tokens(http, p, domain="new") for p in PROMPTS] == expected["v2"], "the first revision's cache blocks are not read"
    assert settle(http) == {"total": SLOTS, "free": 1, "draining": []}
    page = http.get("/metrics").text
    assert metric(page, "memdec_domain_info", domain="new") == 1
    assert metric(page, "memdec_domain_info", domain="new", revision=replaced.json()["revision"]) == 1
    assert metric(page, "memdec_generated_tokens_total", domain="new", mode="decoder") == TOKENS * (2 * len(PROMPTS) + 1)

    assert http.delete("/v1/domains/new", headers=ADMIN).json() == {"id": "new", "object": "domain", "deleted": True}
    assert names(http) == ["a", "b"] and aliases(http) == ["base", "base:a", "base:b"]
    assert "Valid domains: a, b." in refused(ask(http, domain="new"), 404, "domain")
    refused(ask(http, model="base:new"), 404)
    refused(http.delete("/v1/domains/new", headers=ADMIN), 404, "domain")
    assert metric(http.get("/metrics").text, "memdec_domain_info", domain="new") == 0
    assert tokens(http, PROMPTS[0], domain="a") == expected["a"][0] and tokens(http, PROMPTS[0]) == expected["base"][0]


def test_the_domains_of_the_start_can_go_and_come_back(http: httpx.Client, expected: dict[str, list[list[int]]]) -> None:
    """All of them: then the base answers alone, and any of them may come first; their attention layers outlive them."""
    for name in "ab":
        assert http.delete(f"/v1/domains/{name}", headers=ADMIN).status_code == 200
    assert settle(http)["free"] == SLOTS and names(http) == [] and aliases(http) == ["base"]
    assert tokens(http, PROMPTS[0]) == expected["base"][0]
    assert "no domains" in refused(ask(http, domain="a"), 404, "domain")
    for version in VERSIONS[:SLOTS]:
        assert load(http, version, f".{version}").status_code == 201
    with ThreadPoolExecutor(SLOTS) as pool:
        answers = pool.map(lambda v: [tokens(http, p, domain=v) for p in PROMPTS], VERSIONS[:SLOTS])
        assert list(answers) == [expected[v] for v in VERSIONS[:SLOTS]]


def test_the_pages_commands(http: httpx.Client) -> None:
    """docs/domains.md: the three curls as printed, on this server and its folder; its first block's options are the command's."""
    page = (ROOT / "docs" / "domains.md").read_text()
    start, curls = re.findall(r"```sh\n(.*?)```", page, re.S)
    for option in re.findall(r"--[\w-]+", start):
        assert option in OURS, option
    codes = []
    for line in curls.splitlines():
        line = line.replace("http://127.0.0.1:8000", str(http.base_url).rstrip("/")).replace('"papers-', '".v')
        environment = {**os.environ, ADMIN_KEY: ADMIN["Authorization"].removeprefix("Bearer ")}
        done = subprocess.run(
            ["bash", "-c", f"{line} -s -w ' %{{http_code}}'"], capture_output=True, text=True, env=environment, timeout=60
        )
        codes.append(done.stdout.split()[-1])
    assert codes == ["201", "200", "200"]


def test_the_same_revision_again_loads_nothing(http: httpx.Client, folder: Path) -> None:
    """Not even when no slot is free; a newly tuned lambda is taken over."""
    for name, version in (("c", ".v1"), ("d", ".v2")):
        load(http, name, version)
    before = http.get("/v1/domains").json()
    record = folder / ".v1" / "memory_decoder.json"
    old = record.read_text()
    try:
        assert load(http, "c", ".v1").status_code == 200
        assert http.get("/v1/domains").json() == before
        record.write_text(json.dumps({**json.loads(old), "lambda": 0.25}))
        assert load(http, "c", ".v1").json()["lambda"] == 0.25
        assert ask(http, domain="c").headers["X-Memory-Lambda"] == "0.25"
    finally:
        record.write_text(old)


def test_running_requests_finish_on_their_revision(http: httpx.Client, expected: dict[str, list[list[int]]]) -> None:
    """A long answer goes on while its domain is replaced, and another while its domain is unloaded."""
    long = {"prompt": PROMPTS[4], "max_tokens": 300, "ignore_eos": True, "temperature": 0, "model": "base", "return_token_ids": True}
    load(http, "new", ".v1")
    alone = {n: http.post("/v1/completions", json={**long, "domain": n}).json()["choices"][0]["token_ids"] for n in ("a", "new")}
    streams = {n: http.stream("POST", "/v1/completions", json={**long, "domain": n, "stream": True}) for n in ("a", "new")}
    with streams["a"] as of_a, streams["new"] as of_new:
        lines = {"a": of_a.iter_lines(), "new": of_new.iter_lines()}
        begun = {n: next(it) for n, it in lines.items()}
        assert http.delete("/v1/domains/a", headers=ADMIN).status_code == 200
        replaced = load(http, "new", ".v2")
        assert replaced.status_code == 200
        slots = http.get("/v1/domains").json()["slots"]
        assert [d["name"] for d in slots["draining"]] == ["a", "new"] and slots["free"] == 0
        full = refused(load(http, "new", ".v3"), 409, "name")
        for said in ("b (", "new (", "until its last request is done", "A new revision needs a free slot"):
            assert said in full
        assert [tokens(http, p, domain="new") for p in PROMPTS] == expected["v2"]
        for name, iterator in lines.items():
            assert streamed([begun[name], *iterator]) == alone[name]
    assert settle(http)["free"] == 2


def streamed(lines: list[str]) -> list[int]:
    """The tokens of a stream that ended well."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]", events[-1]
    return [token for event in events[:-1] for token in json.loads(event)["choices"][0]["token_ids"] or ()]


def test_full(http: httpx.Client) -> None:
    """The message lists what is loaded, with revisions, and what to do."""
    for version in VERSIONS[: SLOTS - 2]:
        load(http, version, f".{version}")
    message = refused(load(http, "more", ".v6"), 409, "name")
    for domain in http.get("/v1/domains").json()["data"]:
        assert f"{domain['name']} ({domain['revision']})" in message
    assert "--max-decoders" in message and f"All {SLOTS} slots" in message


def test_who_may(http: httpx.Client) -> None:
    """The admin key changes domains and does nothing else; a user's key can't change them."""
    body = {"name": "new", "path": ".v1"}
    wrong: tuple[dict[str, Any], ...] = (
        USER,
        {"Authorization": "Basic the admin's"},
        {"Authorization": "Bearer \xfc".encode("latin-1")},
        {"Authorization": ""},
    )
    for headers in wrong:
        assert "the admin's" not in refused(http.post("/v1/domains", json=body, headers=headers), 401)
        refused(http.delete("/v1/domains/a", headers=headers), 401)
    refused(http.get("/v1/domains", headers=ADMIN), 401)
    refused(http.post("/v1/completions", json={"model": "base", "prompt": "x"}, headers=ADMIN), 401)
    assert names(http) == ["a", "b"]


def test_bad_bodies(http: httpx.Client) -> None:
    """Names that no domain can have, fields of other types, further fields."""
    for name in ("", "a b", "-a", "é", "a/b", "x" * 65):
        refused(load(http, name, ".v1"), 400, "name")
    bodies: tuple[Any, ...] = (
        {},
        {"name": "new"},
        {"name": 1, "path": ".v1"},
        {"name": "new", "path": [".v1"]},
        {"name": "new", "path": ".v1", "lambda": 1},
        [],
    )
    for body in bodies:
        refused(http.post("/v1/domains", json=body, headers=ADMIN), 400)
    refused(http.post("/v1/domains", content=b"{", headers=ADMIN), 400)


def test_paths_stay_in_their_folder(http: httpx.Client, toys: Path, folder: Path, tmp_path: Path) -> None:
    """Absolute and relative ones, links to folders, and links to files, from inside to outside."""
    (folder / ".link").symlink_to(toys / "qwen_a")
    (folder / ".loop").symlink_to(folder / ".loop")
    shutil.copytree(folder / "a", folder / ".linked")
    (folder / ".linked" / "model.safetensors").unlink()
    (folder / ".linked" / "model.safetensors").symlink_to(toys / "qwen_a" / "model.safetensors")
    (tmp_path / "in").symlink_to(folder)
    try:
        outside: list[str | Path] = [
            toys / "qwen_a",
            "../",
            "/",
            "..",
            f"../{toys.name}/qwen_a",
            ".link",
            ".loop",
            ".linked",
            ".nothing",
            "",
            "a/config.json",
            "x\0y",
            "x" * 5000,
        ]
        for path in outside:
            refused(load(http, "new", path), 403, "path")
        assert load(http, "new", tmp_path / "in" / ".v1").status_code == 201, "a link from outside to inside leads inside"
    finally:
        shutil.rmtree(folder / ".linked")
        for link in (".link", ".loop"):
            (folder / link).unlink()


def broken(folder: Path, name: str, weights: Any = None, **config: Any) -> None:
    """A copy of v1 with something wrong: a function of its weights, or entries of its config."""
    made = Path(shutil.copytree(folder / ".v1", folder / name))
    if weights is not None:
        found = load_file(made / "model.safetensors")
        weights(found)
        save_file(found, made / "model.safetensors")
    if config:
        (made / "config.json").write_text(json.dumps(json.loads((made / "config.json").read_text()) | config))


def swap_tokens(made: Path) -> None:
    """A tokenizer of the same size with two ids swapped."""
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_bad_packages_leave_everything_as_it_was(http: httpx.Client, folder: Path, expected: dict[str, list[list[int]]]) -> None:
    """Each is refused with what the start-up check says, or the model's own loader, as a new domain and as a new revision."""
    layer = "model.layers.1.mlp.down_proj.weight"
    broken(folder, ".nan", lambda w: w[layer].view(-1)[7:8].fill_(float("nan")))
    broken(folder, ".truncated")
    weights = folder / ".truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    broken(folder, ".missing", lambda w: w.pop(layer))
    broken(folder, ".misshapen", lambda w: w.update({layer: w[layer][:, :8].clone()}))
    broken(folder, ".wider", hidden_size=128)
    broken(folder, ".tokens")
    swap_tokens(folder / ".tokens")
    for name, figure in ((".figures", {"mixture": float("nan")}), (".surrogate", {"name": "\ud800"})):
        broken(folder, name)
        record = {"format": 1, "bases": {"0" * 32: figure}}
        (folder / name / "memory_decoder.json").write_text(json.dumps(record))
    broken(folder, ".pipe")
    (folder / ".pipe" / "tokenizer.json").unlink()
    os.mkfifo(folder / ".pipe" / "tokenizer.json")
    said = {
        ".figures": "mixture is nan", ".surrogate": "is not UTF-8", ".pipe": "is a named pipe",
        ".nan": "NaN or infinity", ".truncated": "truncated", ".missing": layer.split(".mlp")[0], ".misshapen": "can't be loaded",
        ".wider": "differ in hidden_size", ".tokens": "2 of", ".gpt": "differ in",
    }  # fmt: skip
    before = http.get("/v1/domains").json()
    for path, message in said.items():
        for name in ("new", "a"):
            assert message in refused(load(http, name, path), 400, "path"), path
    assert http.get("/v1/domains").json() == before
    assert aliases(http) == ["base", "base:a", "base:b"]
    for name in ("a", "b"):
        assert [tokens(http, p, domain=name) for p in PROMPTS] == expected[name]
    assert load(http, "new", ".v1").status_code == 201, "and what is good can still be loaded"
    assert [tokens(http, p, domain="new") for p in PROMPTS] == expected["v1"]


@dataclass
class History:
    """Which revisions each domain had, and from when to when they may have answered; None is no revision."""

    spans: dict[str, list[tuple[str | None, float, float]]] = field(default_factory=dict)

    def change(self, name: str, revision: str | None, began: float, done: float) -> None:
        """A change took effect at some moment between two."""
        spans = self.spans.setdefault(name, [(None, 0.0, float("inf"))])
        spans[-1] = (*spans[-1][:2], done)
        spans.append((revision, began, float("inf")))

    def possible(self, name: str, sent: float, answered: float) -> set[str | None]:
        """What a request may have met."""
        return {revision for revision, first, last in self.spans[name] if first <= answered and sent <= last}


def test_a_thousand_requests_while_domains_come_and_go(changing: Server, http: httpx.Client, expected: dict[str, list[list[int]]]) -> None:
    """None is lost, and each answer is, to the token, what a revision gives that its domain had at that moment."""
    history, waiting = History(), deque(range(REQUESTS))
    answers: list[tuple[str, int, float, float, list[int] | None]] = []
    for name in "ab":
        history.change(name, name, 0.0, 0.0)
    targets = ["a", "b", "c", "d", "base"]
    history.spans |= {n: [(None, 0.0, float("inf"))] for n in "cd"}
    history.spans["base"] = [("base", 0.0, float("inf"))]

    async def request(client: httpx.AsyncClient, number: int) -> None:
        name, which = targets[number % len(targets)], number // len(targets) % len(PROMPTS)
        stream = number % 3 == 0
        body = {"model": "base", "prompt": PROMPTS[which], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": stream, **({"domain": name} if name != "base" else {})}
        sent = time.monotonic()
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code == 200:
            got = streamed(answer.text.split("\n\n")) if stream else answer.json()["choices"][0]["token_ids"]
        else:
            assert answer.status_code == 404, f"{number}: {answer.status_code} {answer.text}"
            got = None
            waiting.append(number)  # asked again: a thousand are to be answered
        answers.append((name, which, sent, time.monotonic(), got))

    async def change(client: httpx.AsyncClient, over: asyncio.Event) -> int:
        versions, made = itertools.cycle(VERSIONS), 0
        for act, name in itertools.cycle([("load", "a"), ("unload", "c"), ("load", "c"), ("load", "b"), ("unload", "d"), ("load", "d")]):
            while not over.is_set():
                began, revision = time.monotonic(), next(versions) if act == "load" else None
                if revision is not None:
                    answer = await client.post("/v1/domains", json={"name": name, "path": f".{revision}"}, headers=ADMIN)
                else:
                    answer = await client.delete(f"/v1/domains/{name}", headers=ADMIN)
                if answer.status_code in (200, 201):
                    history.change(name, revision, began, time.monotonic())
                    made += 1
                    break
                # Full, where old revisions still answer; unknown, only before the first load.
                assert answer.status_code == (409 if act == "load" else 404), answer.text
                await asyncio.sleep(0.01)
                if act == "unload":
                    break
            if over.is_set():
                return made
        return made

    async def everything() -> int:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=changing.url, timeout=120, headers=USER, limits=limits) as client:
            over = asyncio.Event()
            changer = asyncio.create_task(change(client, over))

            async def worker() -> None:
                while waiting:
                    await request(client, waiting.popleft())

            await asyncio.gather(*(worker() for _ in range(24)))
            over.set()
            return await changer

    changes = asyncio.run(everything())
    wrong, counts = list[str](), Counter[str]()
    for name, which, sent, answered, got in answers:  # only now is all that happened known
        possible = history.possible(name, sent, answered)
        right = [r for r in possible if (got is None if r is None else expected[r][which] == got)]
        counts[right[0] or "absent" if right else "wrong"] += 1
        if not right:
            whose = [r for r, theirs in expected.items() if theirs[which] == got]
            wrong.append(f"{name} answered like {whose or got}, not like {possible}")
    assert not wrong, f"{len(wrong)} of {len(answers)} wrong after {changes} changes: {wrong[:5]}"
    assert counts.total() - counts["absent"] == REQUESTS
    assert changes >= 10 and len(counts.keys() & set(VERSIONS)) >= 4, (changes, counts)
    print(f"{changes} changes, {counts}")
    assert changing.process.poll() is None
    for name in "cd":
        http.delete(f"/v1/domains/{name}", headers=ADMIN)
    assert settle(http)["free"] == SLOTS - 2


def test_options_that_make_no_sense(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each that names the option and what is wanted."""
    monkeypatch.delenv(ADMIN_KEY, raising=False)
    decoders = ["--decoder", f"a={toys / 'qwen_a'}", "--decoder", f"b={toys / 'qwen_b'}"]
    on, key, root = ["--enable-domain-updates"], ["--admin-key", "k"], ["--domain-root", str(toys)]
    found = check(parse(["base", *decoders, *on, *key, *root])).updates
    assert found == UpdateOptions(3, (toys.resolve(),), "k") and "admin_key" not in repr(found)
    assert check(parse(["base", *decoders])).updates is None
    refusals: list[tuple[str, list[str]]] = [
        ("admin key", [*on, *root]), ("--domain-root", [*on, *key]), ("no such folder", [*on, *key, "--domain-root", "/nowhere/at/all"]),
        ("wanted 2", [*on, *key, *root, "--max-decoders", "1"]), ("wanted 2", [*on, *key, *root, "--max-decoders", str(1 << 16)]),
        ("wanted 2", [*on, *key, *root, "--max-decoders", "0"]), ("without --enable", ["--max-decoders", "0"]),
        ("without --enable", ["--max-decoders", "3"]), ("without --enable", ["--domain-root", "."]), ("without --enable", key),
        ("without --enable", ["--domain-load-timeout", "5"]), ("--domain-load-timeout 0", [*on, *key, *root, "--domain-load-timeout", "0"]),
    ]  # fmt: skip
    for message, words in refusals:
        with pytest.raises(StartupError, match=message):
            check(parse(["base", *decoders, *words]))
    with pytest.raises(StartupError, match="at least one --decoder"):
        check(parse(["base", *on, *key, *root]))


def test_a_folder_of_packages(toys: Path, folder: Path, tmp_path: Path) -> None:
    """Each is named like its folder; hidden ones, and models that are no packages, are not taken."""
    assert packages_in([str(folder)]) == [f"a={folder / 'a'}", f"b={folder / 'b'}"]
    for path in (toys, tmp_path / "nowhere"):
        with pytest.raises(StartupError, match="--decoder-dir"):
            packages_in([str(path)])
    shutil.copytree(folder / "a", tmp_path / "not a name")
    with pytest.raises(StartupError, match="not a name"):
        packages_in([str(tmp_path)])


def test_off_by_default(server: Server) -> None:
    """Without the option there is nothing to find, key or not."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        refused(client.post("/v1/domains", json={"name": "new", "path": "a"}, headers=ADMIN), 405)
        refused(client.delete("/v1/domains/a", headers=ADMIN), 405)
        assert "slots" not in client.get("/v1/domains").json()
        assert text(ask(client, domain="a", lam=ABSENT))


def test_the_engine_killed_during_an_update(changing: Server, http_client: httpx.Client) -> None:
    """Stopped, so that the load waits for it, then killed: the client is told, the server exits with 1, nobody hangs. So it is the module's last test."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    (engine,) = [
        int(line.split()[0]) for line in listing.splitlines() if line.split()[1] == str(changing.process.pid) and "EngineCore" in line
    ]
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(load, http_client, "new", ".v1")
        time.sleep(2)
        assert not update.done()
        os.kill(engine, signal.SIGKILL)
        with contextlib.suppress(httpx.TransportError):  # the server was gone before it could say so
            assert update.result(60).status_code >= 500
    assert changing.process.wait(60) == 1


@pytest.fixture
def http_client(changing: Server) -> Iterator[httpx.Client]:
    """A client for a server that won't be there afterwards."""
    with httpx.Client(base_url=changing.url, timeout=60, headers=USER) as client:
        yield client
