"""One owner of the domains: snapshots are immutable and replaced as a whole."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from memdec.server import metrics
from memdec.server.api.catalogue import offered
from memdec.server.composite_spec import CompositeSpec, DecoderEntry
from memdec.server.engine.loaded_domains import LoadedDomains, Snapshot
from memdec.server.routing.domains import DECODER, Domain, Domains


def domain(name: str, revision: str) -> Domain:
    """A domain without files."""
    return Domain(name, f"/{name}", 0.5, True, revision, 1, "hash", {})


DOMAINS = Domains("base", (domain("a", "1"), domain("b", "1")))


@pytest.fixture
def loaded() -> Iterator[LoadedDomains]:
    """A server's two domains."""
    metrics.DOMAIN.clear()
    yield LoadedDomains(DOMAINS, {(DECODER, "a"): 1, (DECODER, "b"): 2})
    metrics.DOMAIN.clear()


def labelled() -> set[tuple[str, str]]:
    """(domain, revision) of each sample of memdec_domain_info."""
    return {(s.labels["domain"], s.labels["revision"]) for s in next(iter(metrics.DOMAIN.collect())).samples}


def test_slots_are_the_workers() -> None:
    """Front end and workers number the first decoders alike, each on its own."""
    spec = CompositeSpec("X", tuple(DecoderEntry(d.name, d.path, d.revision) for d in DOMAINS), slots=5)
    snapshot = Snapshot.at_start(DOMAINS, spec.first_slots)
    assert {(DECODER, name): slot for name, slot in snapshot.slots.items()} == {(DECODER, "a"): 1, (DECODER, "b"): 2} == spec.first_slots


def test_a_snapshot_that_was_read_never_changes(loaded: LoadedDomains) -> None:
    """A request that read the snapshot before an update keeps domain, revision and slot that belong together."""
    before = loaded.current
    loaded.publish(before.having(domain("a", "2"), 3))
    loaded.publish(loaded.current.without("b"))
    assert (dict(before.slots), dict(before.revisions)) == ({"a": 1, "b": 2}, {"a": "1", "b": "1"})
    assert (dict(loaded.current.slots), dict(loaded.current.revisions)) == ({"a": 3}, {"a": "2"})
    assert labelled() == {("a", "2")}
    with pytest.raises(TypeError):
        before.slots["a"] = 2  # type: ignore[index]


def test_routes_read_what_is_published(loaded: LoadedDomains) -> None:
    """Nothing of the app keeps a copy."""
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(loaded=loaded)), state=SimpleNamespace())
    loaded.publish(loaded.current.having(domain("c", "1"), 3))
    assert offered(request) is loaded.current.domains and offered(request).names == ["a", "b", "c"]


def test_a_subscriber_that_fails(loaded: LoadedDomains) -> None:
    """The snapshot, the metric and the subscribers before it are put back."""
    mirrored: list[list[str]] = []

    def fail(_: Snapshot, after: Snapshot) -> None:
        if after is not before:
            raise RuntimeError("odd")

    before = loaded.current
    loaded.subscribers += [lambda _, after: mirrored.append(after.domains.names), fail]
    with pytest.raises(RuntimeError, match="odd"):
        loaded.publish(before.having(domain("a", "2"), 3).without("b"))
    assert loaded.current is before and mirrored == [["a"], ["a", "b"]] and labelled() == {("a", "1"), ("b", "1")}
