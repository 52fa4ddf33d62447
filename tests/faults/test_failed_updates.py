"""A decoder that can't be loaded, at whatever step: everything stays as it was, and nobody waits for it."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from memdec.decoders.reading.names import RECORD as NAME
from memdec.server import metrics
from memdec.server.checked_models import Models, check_models
from memdec.server.engine import domain_updates
from memdec.server.engine.domain_updates import DomainUpdates
from memdec.server.engine.loaded_domains import LoadedDomains, Snapshot
from memdec.server.engine.settings import UpdateOptions
from memdec.server.errors import BadPackage, MemdecError, OutsideRoots, ShuttingDown
from memdec.server.routing.domains import DECODER, Domains


class Engine(SimpleNamespace):
    """What domain updates ask of the engine's client: one worker, which says what it is told to."""

    def __init__(self, domains: Domains) -> None:
        super().__init__(
            loaded=LoadedDomains(domains, {(DECODER, n): s for s, n in enumerate(domains.names, 1)}),
            draining=False,
            errored=False,
            calls=[],
            answers={},
            staged=None,
            held=set(),
        )
        self.output_processor = SimpleNamespace(timings=SimpleNamespace(know=lambda _: self.step("know")))

    def step(self, name: str) -> Any:
        """One step: fails if it is told to."""
        self.calls.append(name)
        answer = self.answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def everywhere(self, method: str, *args: Any) -> list[list[Any]]:
        """Call a method on the one worker."""
        answer = self.step(method)
        if method == "stage_decoder":
            self.staged = args[0]
        elif method == "install_staged":
            self.held.add(self.staged)
        elif method == "free_slot":
            self.held.discard(args[0])
        elif method == "discard_staged":
            self.staged = None
        return [[answer if answer is not None else method in ("load_staged", "free_slot") or None]]

    def uses(self, _: int) -> bool:
        """No requests."""
        return False


class Updating:
    """A server's updates without a server."""

    def __init__(self, models: Models, root: Path, seconds: float) -> None:
        metrics.DOMAIN.clear()
        self.engine = Engine(models.domains)
        self.updates = DomainUpdates(self.engine, models, UpdateOptions(3, (root.resolve(),), seconds=seconds))
        self.published: list[Domains] = [models.domains]
        self.failures: list[Exception] = []
        self.engine.loaded.subscribers.append(self._publish)

    def _publish(self, _: Snapshot, snapshot: Snapshot) -> None:
        if self.failures:
            raise self.failures.pop()
        self.published.append(snapshot.domains)

    def state(self) -> Any:
        """Everything that anybody can see of the domains."""
        labels = sorted(tuple(s.labels.items()) for s in next(iter(metrics.DOMAIN.collect())).samples)
        e, u, current = self.engine, self.updates, self.engine.loaded.current
        return (
            dict(current.slots), dict(current.revisions), current.domains, self.published[-1], u.slots_json(), labels, set(e.held), dict(u.draining),
        )  # fmt: skip


@pytest.fixture
def packages(toys: Path, tmp_path: Path) -> Path:
    """A folder of decoders: good, and copies for the tests to break."""
    shutil.copytree(toys / "qwen_b", tmp_path / "root" / "good")
    return tmp_path / "root"


@pytest.fixture
def updating(toys: Path, packages: Path) -> Iterator[Updating]:
    """A server with domain a, of which others may be loaded."""
    yield Updating(check_models(str(toys / "base"), [f"a={toys / 'qwen_a'}"]), packages, 60.0)
    metrics.DOMAIN.clear()


ODD = RuntimeError("something odd")
STEPS: dict[str, Callable[[Updating, pytest.MonkeyPatch], None]] = {
    "the check": lambda _, patch: patch.setattr(domain_updates, "open_decoder", raising(ODD)),
    **{f"{step} raises": (lambda u, _, s=step: u.engine.answers.update({s: ODD})) for step in ("stage_decoder", "load_staged", "install_staged", "know")},  # type: ignore[misc]
    **{f"{step} says no": (lambda u, _, s=step: u.engine.answers.update({s: "no"})) for step in ("stage_decoder", "load_staged", "install_staged")},  # type: ignore[misc]
    "publishing": lambda u, _: u.failures.append(ODD),
    "the metrics": lambda _, patch: patch.setattr(metrics.DOMAIN, "labels", raising(ODD)),
    "all slots taken": lambda u, _: u.updates.draining.update(dict.fromkeys((2, 3), u.engine.loaded.current.domains.all[0])),
}  # fmt: skip


def raising(error: Exception) -> Callable[..., Any]:
    """A function that fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("name", ["new", "a"])
@pytest.mark.parametrize("step", STEPS)
def test_each_step_fails_in_turn(updating: Updating, step: str, name: str) -> None:
    """As a new domain and as a new revision: names, slots, revisions, labels and what is published stay; what a worker has is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        STEPS[step](updating, patch)
        before = updating.state()
        with pytest.raises((MemdecError, RuntimeError)):
            asyncio.run(updating.updates.load(name, "good"))
    assert updating.state() == before and updating.engine.staged is None
    updating.engine.answers.clear()
    updating.updates.draining.clear()
    asyncio.run(load_and_wait(updating, name))
    current = updating.engine.loaded.current
    assert current.slots[name] == 2 and current.revisions[name] == updating.published[-1].find(name).revision


async def load_and_wait(updating: Updating, name: str) -> None:
    """Load what is good, and wait until what it replaces is gone."""
    await updating.updates.load(name, "good")
    while updating.updates.tasks:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_unloading_that_fails(updating: Updating) -> None:
    """The same for DELETE."""
    before = updating.state()
    updating.failures.append(ODD)
    with pytest.raises(RuntimeError):
        asyncio.run(updating.updates.unload("a"))
    assert updating.state() == before


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", NAME, "chat_template.jinja", "vocab.json"]
)
def test_a_pipe_in_the_place_of_each_file(updating: Updating, packages: Path, file: str) -> None:
    """Also of those that transformers would open: the next update, and the exit, don't wait for it."""
    made = Path(shutil.copytree(packages / "good", packages / "pipe"))
    (made / file).unlink(missing_ok=True)
    os.mkfifo(made / file)
    before = updating.state()
    began = time.monotonic()
    with pytest.raises(BadPackage, match=f"{re.escape(file)}: is a named pipe"):
        asyncio.run(updating.updates.load("new", "pipe"))
    assert updating.state() == before and time.monotonic() - began < 30


def test_names_and_files_that_are_no_text(updating: Updating, packages: Path) -> None:
    """File names of other bytes, half surrogates in a path: an answer that can be sent."""
    shutil.copytree(packages / "good", packages / "bytes")
    Path(os.fsdecode(os.fsencode(packages) + b"/bytes/\xff.safetensors")).write_bytes(b"x")
    with pytest.raises(BadPackage) as caught:
        asyncio.run(updating.updates.load("new", "bytes"))
    caught.value.to_json().encode()
    str(caught.value).encode()
    with pytest.raises(OutsideRoots):
        asyncio.run(updating.updates.load("new", "go\udcffod"))


def test_a_load_that_hangs(updating: Updating, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that doesn't answer: in the check and in the worker a time limit ends the wait, and at SIGTERM nothing is waited for."""
    hang = threading.Event()
    before = updating.state()
    with monkeypatch.context() as patch:
        patch.setattr(domain_updates, "open_decoder", lambda *_: hang.wait())
        patch.setattr(updating.updates, "options", UpdateOptions(3, updating.updates.options.roots, seconds=0.2))
        with pytest.raises(BadPackage, match=r"not loaded within 0\.2 s \(--domain-load-timeout\)"):
            asyncio.run(updating.updates.load("new", "good"))
    updating.engine.answers["load_staged"] = False
    with monkeypatch.context() as patch:
        patch.setattr(updating.updates, "options", UpdateOptions(3, updating.updates.options.roots, seconds=3.0))
        with pytest.raises(BadPackage, match="not loaded within 3 s"):
            asyncio.run(updating.updates.load("new", "good"))
    assert updating.state() == before and updating.engine.staged is None
    asyncio.run(stopped_in_mid_load(updating))
    assert updating.state() == before
    hang.set()


async def stopped_in_mid_load(updating: Updating) -> None:
    """SIGTERM while a decoder is loaded, with another load and an unload waiting: all are told, none waits, nothing changes."""
    updating.engine.calls.clear()
    waiting: list[asyncio.Task[Any]] = [asyncio.create_task(updating.updates.load("new", "good"))]
    while "load_staged" not in updating.engine.calls:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    waiting.append(asyncio.create_task(updating.updates.load("newer", "good")))
    waiting.append(asyncio.create_task(updating.updates.unload("a")))
    await asyncio.sleep(0.05)
    updating.engine.draining = True
    for told in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10):
        assert isinstance(told, ShuttingDown)


def test_the_exit_waits_for_no_thread() -> None:
    """A process whose check hangs for ever ends when its event loop does."""
    code = (
        "import asyncio, threading\nfrom memdec.server.engine.in_thread import in_thread\n"
        "async def main():\n    in_thread(threading.Event().wait)\n    print(await in_thread(sum, [1, 2]))\nasyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "3\n" and done.returncode == 0, done.stderr


def test_more_weights_than_there_is_memory_for(updating: Updating, packages: Path) -> None:
    """A file with a hole of 300 GB takes no room on the disk: refused by its size, before it is read."""
    made = Path(shutil.copytree(packages / "good", packages / "huge"))
    size = 300 << 30
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (made / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    with pytest.raises(BadPackage, match="bytes of weights, wanted at most"):
        asyncio.run(updating.updates.load("new", "huge"))
