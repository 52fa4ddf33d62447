"""Chooses domain, mode and lambda from headers, body fields and model alias. Whatever is ambiguous is an error."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from memdec.server.errors import BadLambda, BadMode, ConflictingChoice, NoDatastore, NoSuchMemory, RequestError
from memdec.server.routing.domains import BOTH, DECODER, KNN, MIXED, MODES, NGRAM, NONE, RAG, Domain, Domains, Shares

FIELDS = ("domain", "lambda", "memory")  # body fields; the headers are X-Domain, X-Lambda and X-Memory
STRIDE, SOURCES, SHARE = "rag_stride", "memory_sources", "ngram_share"  # body fields
MISSING = {  # what a mode needs
    DECODER: "decoder", KNN: "datastore", RAG: "datastore", NGRAM: "n-gram memory", BOTH: "pair of decoder and n-gram memory",
}  # fmt: skip
LONGEST_STRIDE = 1_000_000  # tokens; longer than any context, so the same as one retrieval


@dataclass(frozen=True)
class Selection:
    """Domain, mode and lambda of one request."""

    domain: Domain | None
    mode: str
    lam: float
    stride: int = 0
    """With `rag`: tokens between retrievals; 0: once."""
    sources: bool = False
    """With `ngram`: whether the answer names the documents that its tokens were seen in."""
    shares: Shares = ()
    """With `both`: how the two memories share lambda."""

    @property
    def mixed(self) -> bool:
        """Whether a distribution is mixed into the base's, with lambda."""
        return self.mode in MIXED

    def headers(self) -> dict[str, str]:
        """Response headers that say what was used."""
        headers = {"X-Memory-Mode": self.mode}
        if self.domain is not None:
            headers |= {"X-Memory-Domain": self.domain.name, **({} if self.mode == RAG else {"X-Memory-Lambda": f"{self.lam:g}"})}
        return headers


@dataclass(frozen=True)
class Given:
    """A value that a client gave, and its source, for error messages."""

    value: object
    source: str


def select(domains: Domains, model: str | None, headers: Mapping[str, Sequence[str]], body: Mapping[str, object]) -> Selection:
    """Choose domain, mode and lambda of one request.

    `model` is its model field, `headers` maps lower-case names to all their values, `body` its JSON fields. Raises RequestError or
    one of its subclasses.
    """
    given = {field: _collect(field, headers, body) for field in FIELDS}
    if model is not None and model.startswith(f"{domains.base}:"):
        given["domain"].append(Given(model.removeprefix(f"{domains.base}:"), "model"))
    domain = _domain(domains, given["domain"])
    mode = _mode(domain, given["memory"])
    lam = _lambda(given["lambda"])
    stride = _stride(body.get(STRIDE), domain, mode)
    sources = _sources(body.get(SOURCES), domain, mode, lam)
    share = _share(body.get(SHARE), domain, mode, lam)
    if domain is None:
        if lam is not None:
            raise RequestError(f"lambda was given without a domain. Add one of: {', '.join(domains.names)}.", "lambda")
        return Selection(None, NONE, 0.0)
    if mode in (RAG, NONE):
        if lam is not None:
            raise RequestError(f"lambda has no meaning with memory {mode!r}, which mixes nothing. Leave it out.", "lambda")
        return Selection(domain, mode, 0.0, stride)
    shares = _shares(domain, share) if mode == BOTH else ()
    used = domain.lambda_of(mode) if lam is None else lam
    if used is None:
        raise RequestError(f"lambda was never tuned for memory 'both' of domain {domain.name!r}. Name it beside {SHARE}.", "lambda")
    if not used:  # the base alone, so the response headers say mode none
        return Selection(domain, NONE, used)
    return Selection(domain, mode, used, sources=sources, shares=shares)


def _collect(field: str, headers: Mapping[str, Sequence[str]], body: Mapping[str, object]) -> list[Given]:
    """All values that a request gives for a field. JSON null means not given, as everywhere in OpenAI's API."""
    values = [Given(value, f"header X-{field.capitalize()}") for value in headers.get(f"x-{field}", ())]
    if body.get(field) is not None:
        values.append(Given(body[field], f"body field {field}"))
    return values


def _domain(domains: Domains, given: list[Given]) -> Domain | None:
    for choice in given:
        if not isinstance(choice.value, str):
            raise RequestError(f"domain must be a string, not {type(choice.value).__name__}.", "domain")
    _require_agreement("domain", given)
    return domains.find(str(given[0].value)) if given else None


def _mode(domain: Domain | None, given: list[Given]) -> str:
    _require_agreement("memory", given)
    if not given:
        return domain.modes[0] if domain is not None else NONE
    mode = given[0].value
    if not isinstance(mode, str) or mode not in MODES:
        raise BadMode(f"memory is {_shown(mode)}. It must be one of: {', '.join(MODES)}.")
    if domain is None and mode != NONE:
        raise BadMode(f"memory {mode!r} needs a domain, and none was chosen.")
    if domain is not None and mode not in domain.modes:
        usable = f"{', '.join(domain.modes[:-1])} or {domain.modes[-1]}"
        kind = NoDatastore if mode in (KNN, RAG) else NoSuchMemory
        raise kind(f"memory {mode!r}: no {MISSING[mode]} is loaded for domain {domain.name!r}. Use {usable}.")
    return mode


def _stride(value: object, domain: Domain | None, mode: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST_STRIDE:
        raise RequestError(f"{STRIDE} is {_shown(value)}. It must be a whole number from 1 to {LONGEST_STRIDE:,}.", STRIDE)
    if domain is None:
        raise RequestError(f"{STRIDE} needs memory 'rag' and a domain, and none was chosen.", STRIDE)
    if mode != RAG:
        raise RequestError(f"{STRIDE} needs memory 'rag', and this request's memory is {mode!r}.", STRIDE)
    return value


def _sources(value: object, domain: Domain | None, mode: str, lam: float | None) -> bool:
    if value is None or value is False:
        return False
    if value is not True:
        raise RequestError(f"{SOURCES} is {_shown(value)}. It must be true or false.", SOURCES)
    if domain is None:
        raise RequestError(f"{SOURCES} needs memory 'ngram' and a domain, and none was chosen.", SOURCES)
    if mode != NGRAM or domain.ngrams is None:
        raise RequestError(f"{SOURCES} needs memory 'ngram', and this request's memory is {mode!r}.", SOURCES)
    if lam == 0:
        raise RequestError(f"{SOURCES} has no meaning with lambda 0, which mixes nothing. Leave one of them out.", SOURCES)
    if not domain.ngrams.sources:
        raise RequestError(f"{SOURCES}: the n-gram memory of domain {domain.name!r} was built without --with-sources.", SOURCES)
    return True


def _share(value: object, domain: Domain | None, mode: str, lam: float | None) -> float | None:
    if value is None:
        return None
    if not _is_fraction(value):
        raise RequestError(f"{SHARE} is {_shown(value)}. It must be a number from 0 to 1.", SHARE)
    if domain is None:
        raise RequestError(f"{SHARE} needs memory 'both' and a domain, and none was chosen.", SHARE)
    if mode != BOTH:
        raise RequestError(f"{SHARE} needs memory 'both', and this request's memory is {mode!r}.", SHARE)
    if lam == 0:
        raise RequestError(f"{SHARE} has no meaning with lambda 0, which mixes nothing. Leave one of them out.", SHARE)
    return float(value)


def _shares(domain: Domain, share: float | None) -> Shares:
    """How mode `both` shares lambda. Raises BadMode where nothing says so."""
    shares = domain.shares_of(share)
    if shares is None:
        raise BadMode(
            f"memory 'both': nobody has measured how the decoder and the n-gram memory of domain {domain.name!r} go together. "
            f"Name {SHARE} and lambda, or have memdec ngram --beside fit them."
        )
    return shares


def _lambda(given: list[Given]) -> float | None:
    values = [_number(choice) for choice in given]
    if len(set(values)) > 1:
        raise ConflictingChoice(_conflict("lambda", given), "lambda")
    return values[0] if values else None


def _number(choice: Given) -> float:
    """A lambda from a JSON number, or from a header's text."""
    value = choice.value
    if isinstance(value, str) and choice.source.startswith("header"):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not _is_fraction(value):
        raise BadLambda(f"lambda is {_shown(choice.value)} ({choice.source}). It must be a number from 0 to 1.")
    return float(value) or 0.0  # -0.0 is 0.0


def _is_fraction(value: object) -> TypeGuard[float]:
    """False for NaN, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _require_agreement(field: str, given: list[Given]) -> None:
    if any(choice.value != given[0].value for choice in given):
        raise ConflictingChoice(_conflict(field, given), field)


def _conflict(field: str, given: list[Given]) -> str:
    places = ", ".join(f"{_shown(choice.value)} ({choice.source})" for choice in given)
    return f"This request names different values of {field}: {places}. Name one."


def _shown(value: object) -> str:
    """A client's value, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
