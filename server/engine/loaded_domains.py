"""The one owner of which domains there are: engine client, updates and routes read its snapshot, and nobody else keeps a copy.

A snapshot is immutable and is replaced as a whole on the event loop, so whoever reads it once sees a domain, its revision and its slot that belong
together.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from memdec.server import metrics
from memdec.server.routing.domains import Domain, Domains


@dataclass(frozen=True)
class Snapshot:
    """The domains at one moment."""

    domains: Domains
    slots: Mapping[str, int]
    """Domain -> slot of the decoder that new requests use, from 1 on."""

    @classmethod
    def at_start(cls, domains: Domains) -> "Snapshot":
        """The domains that a server starts with: slots are numbered in their order, as CompositeSpec.first_slots does for the workers."""
        return cls(domains, MappingProxyType({name: slot for slot, name in enumerate(domains.names, 1)}))

    @cached_property
    def revisions(self) -> Mapping[str, str]:
        """Domain -> revision of its decoder, which salts the prefix cache."""
        return MappingProxyType({domain.name: domain.revision for domain in self.domains})

    def having(self, domain: Domain, slot: int) -> "Snapshot":
        """The same with a domain added or replaced."""
        return Snapshot(self.domains.having(domain), MappingProxyType({**self.slots, domain.name: slot}))

    def without(self, name: str) -> "Snapshot":
        """The same without the domain called `name`."""
        return Snapshot(self.domains.without(name), MappingProxyType({n: slot for n, slot in self.slots.items() if n != name}))


Subscriber = Callable[[Snapshot, Snapshot], None]
"""Called with the old and the new snapshot; raises if it can't follow."""


class LoadedDomains:
    """Holds the current snapshot, and keeps in step what mirrors it: the metric of loaded revisions, and vLLM's list of model names."""

    def __init__(self, domains: Domains) -> None:
        self.current = Snapshot.at_start(domains)
        self.subscribers: list[Subscriber] = [_label_revisions]
        _label_revisions(Snapshot.at_start(Domains(domains.base, ())), self.current)

    def publish(self, snapshot: Snapshot) -> None:
        """Replace the snapshot without yielding to the event loop. If a subscriber raises, all are put back and its error is raised."""
        before, self.current = self.current, snapshot
        try:
            for subscriber in self.subscribers:
                subscriber(before, snapshot)
        except BaseException:
            self.current = before
            for subscriber in self.subscribers:
                with contextlib.suppress(Exception):  # what has just failed may fail again
                    subscriber(snapshot, before)
            raise


def _label_revisions(before: Snapshot, after: Snapshot) -> None:
    """One sample of memdec_domain_info for each loaded revision."""
    for labels in after.revisions.items() - before.revisions.items():
        metrics.DOMAIN.labels(*labels).set(1)
    for labels in before.revisions.items() - after.revisions.items():
        metrics.DOMAIN.remove(*labels)
