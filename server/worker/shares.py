"""Whose turn it is, where requests of several clients compete for the engine's steps: equal shares of its time, whatever one of them asks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from memdec.server.worker.draft_length import StepCost

BACKGROUND = "background"
"""The client whose turn comes when no other wants one: replays."""
MANY = 1 << 20
BESIDE = 2.0  # how many times as long a step may take with guests; 1.5 was no better (measured)
SMALL = 8  # tokens of a step that tells what one request alone takes
LATEST = 0.1  # weight of a new step in its size's mean
Asked = TypeVar("Asked")


class SizeTimes:
    """What steps take by the number of their tokens, in doublings.

    Each doubling remembers its own mean. One line over all recent steps would not do: while a greedy client fills them they all have one size, and
    what a small step takes is forgotten.
    """

    def __init__(self) -> None:
        self.means: dict[int, tuple[float, float]] = {}
        """Bit length of the number of tokens -> mean tokens and mean seconds, the latest steps counting most."""

    def add(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        size = tokens.bit_length()
        x, y = self.means.get(size, (float(tokens), seconds))
        self.means[size] = x + LATEST * (tokens - x), y + LATEST * (seconds - y)

    def beside_the_smallest(self) -> int:
        """Further tokens with which a step of the smallest size takes BESIDE times as long; 1 while no small size, or no other, is known."""
        points = [self.means[size] for size in sorted(self.means)]
        if len(points) < 2 or points[0][0] > SMALL:
            return 1
        (smallest, least), room = points[0], float(MANY)
        for (x, y), (further, later) in pairwise(points):
            slope = (later - y) / (further - x)
            if later > BESIDE * least or (further, later) == points[-1]:
                room = x + (BESIDE * least - y) / slope if slope > 0 else room
                break
        return max(1, min(MANY, int(room - smallest)))


class Shares:
    """Each step is one client's: the one that has had the least of the engine's time. The others' requests come along as far as they hardly delay it.

    What a step takes is measured by its size. A client whose turn it isn't may have as many tokens in it as make it take BESIDE times what the
    smallest steps take: so a request takes about twice its time beside one other client, however much that one asks.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self.sizes = SizeTimes()
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
        return self.sizes.beside_the_smallest()

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self.cost.add(tokens, seconds)
        self.sizes.add(tokens, seconds)

    def took(self, seconds: float, tokens: Mapping[str, int]) -> None:
        """A step took so long, in which each client had so many tokens: all share what it takes without any, and each pays for its own."""
        total = sum(tokens.values())
        if not total:
            return
        self.learn(total, seconds)
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
