"""The spec of the composite model, which the front end sends to the engine process.

It travels in vLLM's `hf_overrides`, which adds entries to the base's config: this module writes them, and reads them in every process.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from memdec.server.json_types import JsonObject
from memdec.server.routing.domains import BOTH, DECODER, KNN, NGRAM, NONE, RAG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURE = "MemoryDecoderForCausalLM"
KEY = "memory_decoder"  # of the base's config


@dataclass(frozen=True)
class DecoderEntry:
    """A decoder that is loaded at the start."""

    name: str
    """Its domain."""
    path: str
    revision: str
    """Part of the prefix-cache salt: tells revisions of a domain apart."""


@dataclass(frozen=True)
class DatastoreEntry:
    """A domain's kNN-LM datastore."""

    name: str
    path: str


@dataclass(frozen=True)
class NgramEntry:
    """A domain's n-gram memory that is loaded at the start."""

    name: str
    path: str


@dataclass(frozen=True)
class Served:
    """Settings for front ends that vLLM's own launcher starts, which don't see memdec's command line; workers ignore it."""

    base: str
    """The name the base is served under."""
    domains: tuple[JsonObject, ...]
    """Each Domain as `dataclasses.asdict` has it."""
    options: tuple[str, ...] = ()
    """Our options, as words of a command line."""


@dataclass(frozen=True)
class CompositeSpec:
    """The composite: a base, decoders beside it, datastores, n-gram memories, and how many decoders there may be."""

    base_architecture: str
    decoders: tuple[DecoderEntry, ...]
    datastores: tuple[DatastoreEntry, ...] = ()
    ngrams: tuple[NgramEntry, ...] = ()
    slots: int = 0
    """Decoders that may be loaded at once, if more than there are at the start."""
    stacked: bool = False
    """Have every step run all decoders as one, as steps in full CUDA graphs do; for tests."""
    served: Served | None = None

    @classmethod
    def of(cls, config: "PreTrainedConfig | JsonObject") -> "CompositeSpec | None":
        """Read the spec from the config that vLLM loaded, or from a mapping of its overrides; None for a base without memories.

        Raises TypeError on entries it doesn't know.
        """
        entries = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
        if entries is None:
            return None
        served = entries.get("served")
        if served is not None:
            served = Served(served["base"], tuple(served["domains"]), tuple(served.get("options", ())))
        decoders = tuple(DecoderEntry(**entry) for entry in entries["decoders"])
        datastores = tuple(DatastoreEntry(**entry) for entry in entries.get("datastores", ()))
        ngrams = tuple(NgramEntry(**entry) for entry in entries.get("ngrams", ()))
        return cls(**{**entries, "decoders": decoders, "datastores": datastores, "ngrams": ngrams, "served": served})

    def overrides(self) -> JsonObject:
        """vLLM's `hf_overrides`, which make the base's folder load as the composite."""
        return {"architectures": [ARCHITECTURE], KEY: asdict(self)}

    @property
    def capacity(self) -> int:
        """How many decoders may be loaded at once."""
        return max(self.slots, len(self.decoders))

    @property
    def first_slots(self) -> dict[tuple[str, str], int]:
        """(mode, domain) -> slot at the start: decoders from 1 on, datastores after the last slot that a decoder may have, then n-grams."""
        named = {(DECODER, entry.name): slot for slot, entry in enumerate(self.decoders, 1)}
        named |= {(KNN, entry.name): slot for slot, entry in enumerate(self.datastores, self.capacity + 1)}
        return named | {(NGRAM, entry.name): slot for slot, entry in enumerate(self.ngrams, self.first_ngram)}

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """(mode, domain) labels of the metrics at the start."""
        counted = {entry.name for entry in self.ngrams}
        together = tuple(entry for entry in self.decoders if entry.name in counted)
        modes = ((self.decoders, (DECODER,)), (self.datastores, (KNN, RAG)), (self.ngrams, (NGRAM,)), (together, (BOTH,)))
        pairs = [(mode, entry.name) for entries, named in modes for entry in entries for mode in (*named, NONE)]
        return tuple(dict.fromkeys(pairs))

    @property
    def first_ngram(self) -> int:
        """The lowest slot that an n-gram memory may have; there is no highest but MAX_SLOT."""
        return self.capacity + len(self.datastores) + 1


def spec_of(config: "PreTrainedConfig | JsonObject") -> CompositeSpec:
    """The spec of a composite's config, for code that only a composite runs. Raises ValueError if it is a plain base."""
    spec = CompositeSpec.of(config)
    if spec is None:
        raise ValueError(f"the model's config has no entry {KEY}: it is no composite")
    return spec
