"""Whose turn it is, where requests of several clients compete for the engine's steps: equal shares of its time, whatever one of them asks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from memdec.server.worker.draft_length import StepCost

BACKGROUND = "background"
"""The client whose turn comes when no other wants one: replays."""
MANY = 1 << 20
Asked = TypeVar("Asked")


class Shares:
    """Each step is one client's: the one that has had the least of the engine's time. The others' requests come along as far as they hardly delay it.

    What a step takes is measured, as a line over its tokens. A client whose turn it isn't may have as many tokens in it as take as long as the
    step takes without any: so a request that is alone in its steps takes about twice its time beside one other client, however much that one asks.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self.used: dict[str, float] = {}
        """Seconds of the engine by client. One that comes, or comes back, has had no less than the one with the least: what it didn't use is gone."""
        self.least = 0.0

    def turn(self, clients: Iterable[str]) -> str:
        """Whose step the next one is, of the clients that have something to run."""
        wanting = sorted(clients)
        for client in wanting:
            self.used[client] = max(self.used.get(client, 0.0), self.least)
        self.used = {client: seconds for client, seconds in self.used.items() if client in wanting or seconds > self.least}
        first = min((c for c in wanting if c != BACKGROUND), key=self.used.__getitem__, default=BACKGROUND)
        self.least = self.used[first]
        return first

    @property
    def fixed(self) -> float:
        """Seconds that a step takes without any tokens: 0 while all had one size, which tells nothing of it."""
        count, x, _, y, _ = self.cost.sums
        return max(0.0, y - self.cost.slope * x) / count if count else 0.0

    @property
    def guests(self) -> int:
        """Tokens that each client whose turn it isn't may have in a step, at least one."""
        slope = self.cost.slope
        return max(1, min(MANY, int(self.fixed / slope))) if slope > 0 else MANY

    def took(self, seconds: float, tokens: Mapping[str, int]) -> None:
        """A step took so long, in which each client had so many tokens: all share what it takes without any, and each pays for its own."""
        total = sum(tokens.values())
        if not total:
            return
        self.cost.add(total, seconds)
        fixed, slope = self.fixed / len(tokens), self.cost.slope
        for client, count in tokens.items():
            self.used[client] = self.used.get(client, self.least) + fixed + slope * count


def fitting(asked: Sequence[tuple[Asked, int]], room: int) -> Collection[Asked]:
    """Those of the requests, in their order, whose tokens fit the room together."""
    found = []
    for one, tokens in asked:
        if tokens <= room:
            found.append(one)
            room -= tokens
    return found
