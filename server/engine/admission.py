"""Admission: limits on choices under way in all, and on choices and tokens under way of each API key."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count

from memdec.server.choice import KEY
from memdec.server.errors import QueueFull, RequestError, TooManyRequests

NOBODY = ""
"""The client of all requests for a single choice where there are no API keys; together they have one fair share."""
_numbers = count(1)


@dataclass
class Client:
    """An API key's limits, and its choices and tokens under way."""

    name: str
    most_choices: int | None = None
    most_tokens: int | None = None
    peers: int = 1
    """Clients that share the server, itself included."""
    choices: int = 0
    """Choices under way, from a request's first byte to its answer's last; a request counts as one until its `n` is known."""
    tokens: int = 0
    """Tokens under way: prompts plus max_tokens of each choice."""


class Account:
    """What one HTTP request adds to its client's work, until its answer is complete."""

    def __init__(self, client: Client) -> None:
        self.client, self.choices, self.tokens = client, 0, 0

    def ask(self, choices: int) -> None:
        """Charge the request's number of choices. Raises TooManyRequests while the client's other requests leave too few, RequestError if they never fit."""
        most, client = self.client.most_choices, self.client
        if most is not None and choices > most:
            raise RequestError(f"This request asks for {choices} choices; this API key may have {most} under way.", "n")
        if most is not None and client.choices - self.choices + choices > most:
            raise TooManyRequests(f"This API key has {client.choices - self.choices} choices under way; its limit is {most}.")
        client.choices += choices - self.choices
        self.choices = choices

    def spend(self, tokens: int) -> None:
        """Charge further tokens of the request. Raises as `ask` does."""
        most, client = self.client.most_tokens, self.client
        if most is not None and self.tokens + tokens > most:
            raise RequestError(
                f"This request may have {self.tokens + tokens:,} tokens; this API key may have {most:,} under way.", "max_tokens"
            )
        if most is not None and client.tokens + tokens > most:
            raise TooManyRequests(f"This API key has {client.tokens:,} tokens under way, prompts and max_tokens; its limit is {most:,}.")
        client.tokens += tokens
        self.tokens += tokens

    def close(self) -> None:
        """Give back the request's choices and tokens: its answer is complete, or its sender has left."""
        self.client.choices -= self.choices
        self.client.tokens -= self.tokens
        self.choices = self.tokens = 0


account: ContextVar[Account | None] = ContextVar("account", default=None)
"""The account of the HTTP request that is being served; None without API keys."""


class Places:
    """Places that one HTTP request keeps for choices which the engine doesn't have yet."""

    def __init__(self, count: int, client: str) -> None:
        self.count, self.client = count, client


_mine: ContextVar[Places | None] = ContextVar("places", default=None)


def turn_of_request() -> str:
    """The client in whose fair share the engine runs the current HTTP request."""
    places = _mine.get()
    return NOBODY if places is None else places.client


class Admission:
    """Reserves queue places from a request's admission until the engine counts it: vLLM's own check misses requests that arrive at the same moment."""

    def __init__(self, bound: int | None) -> None:
        self.bound, self.kept = bound, 0

    @contextmanager
    def keep(self, choices: int, under_way: int) -> Iterator[None]:
        """Within, keep `choices` places. Raises QueueFull if the engine's `under_way` requests, and those on their way to it, leave too few.

        A client with no more than an equal part of all places gets them all the same: the queue is full of other clients' requests.
        """
        mine = account.get()
        if mine is not None:
            mine.ask(choices)
        guaranteed = mine is not None and self.bound is not None and mine.client.choices <= self.bound // mine.client.peers
        if self.bound is not None and under_way + self.kept + choices > self.bound and not guaranteed:
            raise QueueFull("The server has as many requests as it takes. Try again in a few seconds, or on another replica.")
        # Without keys, a request for many choices gets a fair share of its own, so that it can't delay all others.
        name = f"{KEY}{mine.client.name}" if mine is not None else f"request {next(_numbers)}" if choices > 1 else NOBODY
        places = Places(choices, name)
        self.kept += choices
        token = _mine.set(places)
        try:
            yield
        finally:
            _mine.reset(token)
            self._give_back(places, places.count)

    def arrived(self, choices: int) -> None:
        """Release places: the engine has taken, or refused, this many choices of the current HTTP request."""
        if (places := _mine.get()) is not None:
            self._give_back(places, min(choices, places.count))

    def _give_back(self, places: Places, count: int) -> None:
        places.count -= count
        self.kept -= count
