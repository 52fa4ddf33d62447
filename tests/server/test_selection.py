"""From header, body and alias to domain, mode and lambda, without a server."""

from typing import Any

import pytest

from memdec.server.errors import BadLambda, BadMode, ConflictingChoice, MemdecError, NoDatastore, RequestError, UnknownDomain
from memdec.server.routing.domains import Domain, Domains
from memdec.server.routing.selection import Selection, select

A, B = (Domain(name, f"/{name}", lam, True, f"r{name}", 1, "hash", {}) for name, lam in (("a", 0.6), ("b", 0.25)))
DOMAINS = Domains("base", (A, B))


def choose(model: str | None = "base", headers: dict[str, list[str]] | None = None, **body: Any) -> Selection:
    """The selection of one request; `lam` stands for the body field lambda."""
    return select(DOMAINS, model, headers or {}, {"lambda" if name == "lam" else name: value for name, value in body.items()})


@pytest.mark.parametrize(
    "request_",
    [
        {"domain": "a"},
        {"headers": {"x-domain": ["a"]}},
        {"model": "base:a"},
        {"model": "base:a", "headers": {"x-domain": ["a", "a"]}, "domain": "a"},
        {"model": None, "domain": "a"},
        {"domain": "a", "lam": None, "memory": None},
        {"domain": "a", "memory": "decoder"},
    ],
)
def test_ways_to_choose(request_: dict[str, Any]) -> None:
    """Header, body and alias mean the same, alone and together; null means not given."""
    selection = choose(**request_)
    assert selection == Selection(A, "decoder", 0.6)
    assert selection.headers() == {"X-Memory-Mode": "decoder", "X-Memory-Domain": "a", "X-Memory-Lambda": "0.6"}


@pytest.mark.parametrize("request_", [{}, {"domain": None}, {"memory": "none"}, {"model": None}, {"model": "base", "lam": None}])
def test_no_domain(request_: dict[str, Any]) -> None:
    """Without a domain the base answers, and no header names one."""
    selection = choose(**request_)
    assert selection == Selection(None, "none", 0.0)
    assert selection.headers() == {"X-Memory-Mode": "none"}


@pytest.mark.parametrize(("given", "lam"), [(0, 0.0), (0.0, 0.0), (1, 1.0), (0.25, 0.25), (1e-300, 1e-300)])
def test_lambda_of_the_body(given: float, lam: float) -> None:
    """Any number from 0 to 1."""
    assert choose(domain="a", lam=given).lam == lam


@pytest.mark.parametrize(("given", "lam"), [("0.5", 0.5), ("1", 1.0), ("1e-3", 0.001), (" 0.5 ", 0.5)])
def test_lambda_of_the_header(given: str, lam: float) -> None:
    """A header's text is read as a number, and agrees with an equal number in the body."""
    assert choose(domain="b", headers={"x-lambda": [given]}).lam == lam
    assert choose(domain="b", headers={"x-lambda": [given]}, lam=lam).lam == lam


HUGE = 10**400
BAD = [-0.1, 1.1, float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, "0.5", True, False, [], {}, [0.5]]


@pytest.mark.parametrize("lam", BAD, ids=[str(b)[:8] for b in BAD])
def test_bad_lambda(lam: Any) -> None:
    """Everything else is refused by name, in a short message."""
    with pytest.raises(BadLambda) as caught:
        choose(domain="a", lam=lam)
    assert caught.value.param == "lambda" and len(str(caught.value)) < 200


@pytest.mark.parametrize("lam", ["abc", "nan", "inf", "-1", "1.01", "", "1e999", "0,5", "0x1"])
def test_bad_lambda_header(lam: str) -> None:
    """So is a header that is no number from 0 to 1."""
    with pytest.raises(BadLambda):
        choose(domain="a", headers={"x-lambda": [lam]})


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        ({"domain": "a", "headers": {"x-domain": ["b"]}}, ConflictingChoice, "domain"),
        ({"domain": "b", "model": "base:a"}, ConflictingChoice, "domain"),
        ({"headers": {"x-domain": ["a", "b"]}}, ConflictingChoice, "domain"),
        ({"domain": "a", "lam": 0.5, "headers": {"x-lambda": ["0.4"]}}, ConflictingChoice, "lambda"),
        ({"domain": "a", "memory": "none", "headers": {"x-memory": ["decoder"]}}, ConflictingChoice, "memory"),
        ({"domain": "law"}, UnknownDomain, "domain"),
        ({"domain": ""}, UnknownDomain, "domain"),
        ({"domain": "A"}, UnknownDomain, "domain"),
        ({"domain": "a\0"}, UnknownDomain, "domain"),
        ({"model": "base:law"}, UnknownDomain, "domain"),
        ({"model": "base:"}, UnknownDomain, "domain"),
        ({"domain": 5}, RequestError, "domain"),
        ({"domain": []}, RequestError, "domain"),
        ({"domain": {}, "model": "base:a"}, RequestError, "domain"),
        ({"domain": False}, RequestError, "domain"),
        ({"lam": 0.5}, RequestError, "lambda"),
        ({"domain": "a", "memory": "brain"}, BadMode, "memory"),
        ({"domain": "a", "memory": 5}, BadMode, "memory"),
        ({"domain": "a", "memory": ["decoder"]}, BadMode, "memory"),
        ({"memory": "decoder"}, BadMode, "memory"),
        ({"memory": "brain"}, BadMode, "memory"),
        ({"domain": "a", "memory": "knn"}, NoDatastore, "memory"),
        ({"domain": "a", "memory": "rag"}, NoDatastore, "memory"),
        ({"domain": "a", "memory": "none", "lam": 0.5}, RequestError, "lambda"),
        ({"domain": "a", "memory": "none", "lam": 0}, RequestError, "lambda"),
        ({"domain": "a", "headers": {"x-memory": ["none"], "x-lambda": ["0.5"]}}, RequestError, "lambda"),
        ({"memory": "none", "lam": 0.5}, RequestError, "lambda"),
        ({"domain": "a", "lam": 0, "headers": {"x-lambda": ["0.4"]}}, ConflictingChoice, "lambda"),
    ],
)
def test_refusals(request_: dict[str, Any], error: type[MemdecError], param: str) -> None:
    """Each has its class, and says which parameter is to blame."""
    with pytest.raises(error) as caught:
        choose(**request_)
    assert caught.value.param == param


def test_unknown_domain_lists_names() -> None:
    """The message names the valid domains, and only the beginning of a long wrong one."""
    with pytest.raises(UnknownDomain) as caught:
        choose(domain="x" * 10_000)
    assert "Valid domains: a, b." in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(UnknownDomain, match="no domains"):
        select(Domains("base", ()), "base", {}, {"domain": "a"})


def test_mode_none_keeps_the_domain_out() -> None:
    """A domain with memory none is reported, with lambda 0, and isn't used."""
    selection = choose(domain="a", memory="none")
    assert not selection.mixed
    assert selection.headers() == {"X-Memory-Mode": "none", "X-Memory-Domain": "a", "X-Memory-Lambda": "0"}


@pytest.mark.parametrize("named", [{}, {"memory": "decoder"}, {"headers": {"x-memory": ["decoder"], "x-lambda": ["0"]}}])
def test_lambda_0_says_that_the_base_answered(named: dict[str, Any]) -> None:
    """The answer's headers say what was used, which for lambda 0 is no memory."""
    assert choose(domain="a", lam=0, **named).headers() == {"X-Memory-Mode": "none", "X-Memory-Domain": "a", "X-Memory-Lambda": "0"}


def test_other_models_are_not_ours() -> None:
    """A model name that isn't the base's is left to vLLM, which knows what exists."""
    assert choose(model="other:a").domain is None
    assert choose(model="base2").domain is None


def test_error_bodies() -> None:
    """Every error of the tree becomes OpenAI's object."""
    todo: list[type[MemdecError]] = [MemdecError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        error = kind("what to do next").to_body()["error"]
        assert error["message"] == "what to do next" and error["code"] == kind.status and error["type"] and "param" in error
