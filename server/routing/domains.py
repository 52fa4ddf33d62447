"""The domains a server offers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from memdec.server.errors import DomainNotAllowed, UnknownDomain
from memdec.server.json_types import JsonObject

DECODER, KNN, RAG, NGRAM, BOTH, NONE = "decoder", "knn", "rag", "ngram", "both", "none"
MODES = (DECODER, KNN, RAG, NGRAM, BOTH, NONE)
MIXED = (DECODER, KNN, NGRAM, BOTH)
"""Modes whose distribution is mixed into the base's, with lambda, in the engine's step."""
MEMORIES = {DECODER: (DECODER,), NGRAM: (NGRAM,), BOTH: (DECODER, NGRAM)}
"""Modes whose memories may come and go -> the memories, whose slots a request keeps."""
Shares = tuple[tuple[float, float], ...]
"""The decoder's and the n-gram memory's share of lambda, by tokens of the longest match from 0 on; longer ones have the last. What is left is the base's."""


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

    def to_json(self) -> JsonObject:
        """The `datastore` object of an entry of /v1/domains."""
        return {"entries": self.entries, "lambda": self.lam, "size_bytes": self.size, "revision": self.revision}


@dataclass(frozen=True)
class Both:
    """How a decoder and an n-gram memory are mixed in together, as `memdec ngram --beside` fitted it beside this base."""

    decoder: str
    """Revision of the decoder."""
    lam: float
    """Lambda of requests in mode `both` that name none: the sum of both memories' weights, at the length of match where it is largest."""
    shares: Shares
    better: bool
    """Whether the mixture with both memories had a lower perplexity than with either alone, on text that the shares were not fitted on."""
    perplexity: dict[str, float]
    """What was measured there; empty if documents were added or removed since."""

    @classmethod
    def of(cls, entry: JsonObject) -> "Both":
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**entry, "shares": tuple((decoder, ngram) for decoder, ngram in entry["shares"])})

    def to_json(self) -> JsonObject:
        """The `both` object of an entry of /v1/domains."""
        decoder, ngram = (list(own) for own in zip(*self.shares, strict=True))
        return {
            "lambda": self.lam,
            "better": self.better,
            "decoder_shares": decoder,
            "ngram_shares": ngram,
            "perplexity": self.perplexity or None,
        }


@dataclass(frozen=True)
class Ngrams:
    """A domain's n-gram memory."""

    path: str
    lam: float
    """Lambda of requests in mode `ngram` that name none."""
    order: int
    """Longest n-gram, in tokens: one more than the longest context that is looked up."""
    tokens: int
    """Tokens of its text."""
    size: int
    """Bytes of its files."""
    revision: str
    tuned: bool
    """Whether `lam` was tuned beside this base."""
    sources: bool
    """Whether answers may name the documents that a token was seen in."""
    perplexity: dict[str, float]
    """Measured perplexities; empty if never measured."""
    weights: tuple[float, ...] = ()
    """Weight of the memory after a longest match of 1, 2, … tokens."""
    beside: tuple[Both, ...] = ()
    """The shares that were fitted with decoders beside this base."""

    @classmethod
    def of(cls, entry: JsonObject) -> "Ngrams":
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**entry, "weights": tuple(entry["weights"]), "beside": tuple(Both.of(one) for one in entry["beside"])})

    def shared(self, share: float) -> Shares:
        """Shares of lambda where this memory has `share` of it, whatever matches, and a decoder the rest."""
        return ((1 - share, share), *((1 - share, share * weight) for weight in self.weights))

    def to_json(self) -> JsonObject:
        """The `ngram` object of an entry of /v1/domains."""
        return {
            "order": self.order,
            "tokens": self.tokens,
            "lambda": self.lam,
            "lambda_tuned": self.tuned,
            "sources": self.sources,
            "size_bytes": self.size,
            "revision": self.revision,
            "perplexity": self.perplexity or None,
        }


@dataclass(frozen=True)
class Domain:
    """A loaded decoder with its datastore and n-gram memory, if it has any; or an n-gram memory alone, which the fields then describe."""

    name: str
    path: str
    lam: float
    """Lambda of requests in mode `decoder` that name none."""
    tuned: bool
    """Whether `lam` was tuned beside this base."""
    revision: str
    size: int
    """Bytes of its weights."""
    tokenizer: str
    """Hash of its token -> id map, equal to the base's."""
    perplexity: JsonObject
    """Measured test perplexities beside this base; empty if never measured."""
    datastore: Datastore | None = None
    ngrams: Ngrams | None = None
    decoder: bool = True
    """Whether the domain has a decoder."""

    @classmethod
    def of(cls, entry: JsonObject) -> "Domain":
        """The domain that `dataclasses.asdict` made `entry` of."""
        store, ngrams = entry["datastore"], entry["ngrams"]
        parts = {
            "datastore": Datastore(**store) if store is not None else None,
            "ngrams": Ngrams.of(ngrams) if ngrams is not None else None,
        }
        return cls(**{**entry, **parts})

    @classmethod
    def of_ngrams(cls, name: str, ngrams: Ngrams, tokenizer: str) -> "Domain":
        """A domain without a decoder."""
        n = ngrams
        return cls(name, n.path, n.lam, n.tuned, n.revision, n.size, tokenizer, dict(n.perplexity), ngrams=n, decoder=False)

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that requests may name; the first is what a request gets that names none."""
        retrieved = (KNN, RAG) if self.datastore is not None else ()
        counted = (NGRAM,) if self.ngrams is not None else ()
        own = (*((DECODER,) if self.decoder else ()), *retrieved, *counted, *((BOTH,) if self.decoder and counted else ()), NONE)
        return tuple(sorted(own, key=lambda mode: mode != BOTH)) if self.both is not None and self.both.better else own

    @property
    def both(self) -> Both | None:
        """The shares that were fitted for exactly this decoder, n-gram memory and base; None: there are none."""
        fitted = self.ngrams.beside if self.decoder and self.ngrams is not None else ()
        return next((one for one in fitted if one.decoder == self.revision), None)

    @property
    def is_tuned(self) -> bool:
        """Whether lambda of the mode that requests get that name none was tuned beside this base."""
        return self.tuned or self.modes[0] == BOTH

    def lambda_of(self, mode: str) -> float | None:
        """Lambda of requests in a mode that name none; None: they must name one."""
        if mode == BOTH:
            return self.both.lam if self.both is not None else None
        if mode == KNN and self.datastore is not None:
            return self.datastore.lam
        return self.ngrams.lam if mode == NGRAM and self.ngrams is not None else self.lam

    def shares_of(self, share: float | None) -> Shares | None:
        """How mode `both` shares lambda: as a request says, whose n-gram memory has `share` of it, or as fitted. None: neither."""
        if share is not None and self.ngrams is not None:
            return self.ngrams.shared(share)
        return self.both.shares if self.both is not None else None

    def to_json(self) -> JsonObject:
        """One entry of /v1/domains."""
        return {
            "id": self.name,
            "object": "domain",
            "name": self.name,
            "lambda": self.lambda_of(self.modes[0]),
            "lambda_tuned": self.is_tuned,
            "modes": list(self.modes),
            "revision": self.revision,
            "size_bytes": self.size,
            "tokenizer_hash": self.tokenizer,
            "perplexity": self.perplexity or None,
            "datastore": self.datastore.to_json() if self.datastore is not None else None,
            "ngram": self.ngrams.to_json() if self.ngrams is not None else None,
            "both": self.both.to_json() if self.both is not None else None,
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
        """A copy with a domain added, or put in the place of the one of its name."""
        if domain.name not in self.names:
            return replace(self, all=(*self.all, domain))
        return replace(self, all=tuple(domain if d.name == domain.name else d for d in self.all))

    def without(self, name: str) -> "Domains":
        """A copy without the domain called `name`."""
        return replace(self, all=tuple(d for d in self.all if d.name != name))

    @property
    def models(self) -> list[str]:
        """The model names that requests may give: the base, and one alias a domain."""
        return [self.base, *(self.alias(d) for d in self.all)]
