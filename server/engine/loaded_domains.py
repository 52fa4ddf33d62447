"""The one owner of which domains there are: engine client, updates and routes read its snapshot, and nobody else keeps a copy.

A snapshot is immutable and is replaced as a whole on the event loop, so whoever reads it once sees a domain, its revision and its slot that belong
together.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from memdec.server import metrics
from memdec.server.routing.domains import DECODER, MEMORIES, NGRAM, Domain, Domains

NO_SLOTS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Snapshot:
    """The domains at one moment."""

    domains: Domains
    slots: Mapping[str, int]
    """Domain -> slot of the decoder that new requests use, from 1 on."""
    ngram_slots: Mapping[str, int] = field(default_factory=lambda: NO_SLOTS)
    """Domain -> slot of the n-gram memory that new requests use, above all other slots."""

    @classmethod
    def at_start(cls, domains: Domains, slots: Mapping[tuple[str, str], int]) -> "Snapshot":
        """The domains that a server starts with; `slots` are the workers', by mode and domain (CompositeSpec.first_slots)."""
        of_mode = [MappingProxyType({name: slot for (kind, name), slot in slots.items() if kind == mode}) for mode in (DECODER, NGRAM)]
        return cls(domains, *of_mode)

    @cached_property
    def revisions(self) -> Mapping[str, str]:
        """Domain -> revision of its decoder, which salts the prefix cache."""
        return MappingProxyType({domain.name: domain.revision for domain in self.domains})

    def slot_of(self, memory: str, name: str) -> int:
        """The slot of a domain's decoder or n-gram memory; 0 if it has none."""
        return {DECODER: self.slots, NGRAM: self.ngram_slots}[memory].get(name, 0)

    def slots_of(self, mode: str, name: str) -> tuple[int, ...]:
        """The slots that a new request gets, one for each of the mode's memories (0: there is none); () where memories have the same slot for ever."""
        return tuple(self.slot_of(memory, name) for memory in MEMORIES.get(mode, ()))

    def having(self, domain: Domain, slot: int) -> "Snapshot":
        """The same with a domain added or replaced, whose decoder has this slot."""
        return Snapshot(self.domains.having(domain), MappingProxyType({**self.slots, domain.name: slot}), self.ngram_slots)

    def having_ngrams(self, domain: Domain, slot: int) -> "Snapshot":
        """The same with a domain added or replaced, whose n-gram memory has this slot."""
        return Snapshot(self.domains.having(domain), self.slots, MappingProxyType({**self.ngram_slots, domain.name: slot}))

    def having_memory(self, mode: str, domain: Domain, slot: int) -> "Snapshot":
        """The same with a domain added or replaced, whose memory of this mode has this slot."""
        return self.having_ngrams(domain, slot) if mode == NGRAM else self.having(domain, slot)

    def without(self, name: str) -> "Snapshot":
        """The same without the domain called `name`."""
        return Snapshot(self.domains.without(name), _without(self.slots, name), _without(self.ngram_slots, name))


Subscriber = Callable[[Snapshot, Snapshot], None]
"""Called with the old and the new snapshot; raises if it can't follow."""


class LoadedDomains:
    """Holds the current snapshot, and keeps in step what mirrors it: the metric of loaded revisions, and vLLM's list of model names."""

    def __init__(self, domains: Domains, slots: Mapping[tuple[str, str], int]) -> None:
        self.current = Snapshot.at_start(domains, slots)
        self.subscribers: list[Subscriber] = [_label_revisions]
        _label_revisions(Snapshot.at_start(Domains(domains.base, ()), {}), self.current)

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


def _without(slots: Mapping[str, int], name: str) -> Mapping[str, int]:
    return MappingProxyType({n: slot for n, slot in slots.items() if n != name})


def _label_revisions(before: Snapshot, after: Snapshot) -> None:
    """One sample of memdec_domain_info for each loaded revision."""
    for labels in after.revisions.items() - before.revisions.items():
        metrics.DOMAIN.labels(*labels).set(1)
    for labels in before.revisions.items() - after.revisions.items():
        metrics.DOMAIN.remove(*labels)
