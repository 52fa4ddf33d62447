"""The domains a server offers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.errors import UnknownDomain


@dataclass(frozen=True)
class Domain:
    """One loaded decoder."""

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

    def to_json(self) -> dict[str, Any]:
        """One entry of /v1/domains."""
        return {
            "id": self.name,
            "object": "domain",
            "name": self.name,
            "lambda": self.lam,
            "lambda_tuned": self.tuned,
            "modes": ["decoder", "none"],
            "revision": self.revision,
            "size_bytes": self.size,
            "tokenizer_hash": self.tokenizer,
            "perplexity": self.perplexity or None,
        }


@dataclass(frozen=True)
class Domains:
    """All of them, beside the base model they extend."""

    base: str
    """The name the base is served under."""
    all: tuple[Domain, ...]

    def __iter__(self) -> Iterator[Domain]:
        return iter(self.all)

    @property
    def names(self) -> list[str]:
        """Names of the domains, in the order they were given."""
        return [d.name for d in self.all]

    def find(self, name: str) -> Domain:
        """The domain called `name`. Raises UnknownDomain, which lists the valid names."""
        for domain in self.all:
            if domain.name == name:
                return domain
        valid = f"Valid domains: {', '.join(self.names)}." if self.all else "This server has no domains."
        raise UnknownDomain(f"The domain {name[:80]!r} does not exist. {valid}")

    def alias(self, domain: Domain) -> str:
        """The model name that selects a domain, for clients that can set nothing else."""
        return f"{self.base}:{domain.name}"
