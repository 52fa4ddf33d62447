"""The domains a server offers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from memdec.server.errors import DomainNotAllowed, UnknownDomain

DECODER, KNN, RAG, NONE = "decoder", "knn", "rag", "none"
MODES = (DECODER, KNN, RAG, NONE)


@dataclass(frozen=True)
class Datastore:
    """A domain's datastore, which serves its retrieval baselines kNN-LM and RAG."""

    path: str
    lam: float
    """Lambda of kNN-LM requests that name none: tuned beside this base."""
    entries: int
    size: int
    """Bytes of its files."""
    revision: str

    def to_json(self) -> dict[str, Any]:
        """The `datastore` object of an entry of /v1/domains."""
        return {"entries": self.entries, "lambda": self.lam, "size_bytes": self.size, "revision": self.revision}


@dataclass(frozen=True)
class Domain:
    """One loaded decoder, and its datastore if it has one."""

    name: str
    path: str
    lam: float
    """Lambda of requests that name none."""
    tuned: bool
    """Whether `lam` was tuned beside this base."""
    revision: str
    size: int
    """Bytes of its weights."""
    tokenizer: str
    """Hash of its token -> id map, equal to the base's."""
    perplexity: dict[str, Any]
    """Measured test perplexities beside this base; empty if never measured."""
    datastore: Datastore | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Domain":
        """From what `dataclasses.asdict` made of one."""
        store = entry["datastore"]
        return cls(**{**entry, "datastore": Datastore(**store) if store is not None else None})

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that requests may name."""
        return MODES if self.datastore is not None else (DECODER, NONE)

    def to_json(self) -> dict[str, Any]:
        """One entry of /v1/domains."""
        return {
            "id": self.name,
            "object": "domain",
            "name": self.name,
            "lambda": self.lam,
            "lambda_tuned": self.tuned,
            "modes": list(self.modes),
            "revision": self.revision,
            "size_bytes": self.size,
            "tokenizer_hash": self.tokenizer,
            "perplexity": self.perplexity or None,
            "datastore": self.datastore.to_json() if self.datastore is not None else None,
        }


@dataclass(frozen=True)
class Domains:
    """The base model's name and all domains that extend it."""

    base: str
    """The name the base is served under."""
    all: tuple[Domain, ...]
    withheld: frozenset[str] = frozenset()
    """Names of domains that are loaded, but not for this client."""

    def __iter__(self) -> Iterator[Domain]:
        return iter(self.all)

    @property
    def names(self) -> list[str]:
        """Names of the domains, in the order they were given."""
        return [d.name for d in self.all]

    def find(self, name: str) -> Domain:
        """The domain called `name`. Raises UnknownDomain or DomainNotAllowed, which list the valid names."""
        if (domain := self.get(name)) is not None:
            return domain
        valid = f"Valid domains: {', '.join(self.names)}." if self.all else "There are no domains to use."
        if name in self.withheld:
            raise DomainNotAllowed(f"This API key may not use the domain {name!r}. {valid}")
        raise UnknownDomain(f"The domain {name[:80]!r} does not exist. {valid}")

    def alias(self, domain: Domain) -> str:
        """The model name that selects a domain, for clients that can set nothing else."""
        return f"{self.base}:{domain.name}"

    def only(self, allowed: Callable[[str], bool]) -> "Domains":
        """The domains that an API key may use; the others are withheld."""
        kept = tuple(d for d in self.all if allowed(d.name))
        return replace(self, all=kept, withheld=frozenset(self.names) - {d.name for d in kept})

    def get(self, name: str) -> Domain | None:
        """The domain called `name`, if there is one."""
        return next((d for d in self.all if d.name == name), None)

    def having(self, domain: Domain) -> "Domains":
        """The same with a domain added, or in the place of the one of its name."""
        if domain.name not in self.names:
            return replace(self, all=(*self.all, domain))
        return replace(self, all=tuple(domain if d.name == domain.name else d for d in self.all))

    def without(self, name: str) -> "Domains":
        """The same without the domain called `name`."""
        return replace(self, all=tuple(d for d in self.all if d.name != name))

    @property
    def models(self) -> list[str]:
        """The model names that requests may give: the base, and one alias a domain."""
        return [self.base, *(self.alias(d) for d in self.all)]
