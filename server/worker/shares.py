"""Whose turn it is, where requests of several clients compete for the engine's steps: equal shares of its time, whatever one of them asks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from memdec.server.worker.draft_length import StepCost

BACKGROUND = "background"
"""The client whose turn comes when no other wants one: replays."""
MANY = 1 << 20
BESIDE = 2.0  # how many times as long a step may take with guests; 1.5 was no better (measured)
BETWEEN = 3.0  # the same for steps between another's requests, which wait half of such a step
SMALL = 8  # tokens of a step that tells what one request alone takes
LATEST = 0.1  # weight of a new step in its size's mean
TOO_MUCH = 1.0  # times the turn's own step: a client whose rows add more, however few they are, sits out the steps of others
RETRY = 0.97  # of what a client was seen to add, with each step it sits out: after some dozens it may show again what its rows add
REMEMBERED = 256  # clients whose step times are kept, the latest ones
Asked = TypeVar("Asked")
Value = TypeVar("Value")


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

    def of(self, tokens: int) -> float | None:
        """Mean seconds of steps of about so many tokens: of the next size that is known, the smaller first. None: no size is known."""
        size = tokens.bit_length()
        known = min(self.means, key=lambda other: (abs(other - size), other), default=None)
        return None if known is None else self.means[known][1]

    def beside_the_smallest(self, times: float = BESIDE) -> int:
        """Further tokens with which a step of the smallest size takes so many times as long; 1 while no small size, or no other, is known."""
        points = [self.means[size] for size in sorted(self.means)]
        if len(points) < 2 or points[0][0] > SMALL:
            return 1
        (smallest, least), room = points[0], float(MANY)
        for (x, y), (further, later) in pairwise(points):
            slope = (later - y) / (further - x)
            if later > times * least or (further, later) == points[-1]:
                room = x + (times * least - y) / slope if slope > 0 else room
                break
        return max(1, min(MANY, int(room - smallest)))


class Shares:
    """Each step is one client's: the one that has had the least of the engine's time. The others' requests come along as far as they hardly delay it.

    What a step takes is measured by its size. A client whose turn it isn't may have as many tokens in it as make it take BESIDE times what the
    smallest steps take: so a request takes about twice its time beside one other client, however much that one asks.

    Tokens don't tell all: rows that are sampled, drafted for or want log-probabilities cost a step more than their number suggests, in the front end,
    too. So what each client adds to the steps of others is measured as well, and who adds too much isn't let in until it has been tried again.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self.sizes = SizeTimes()
        """Of all steps that one client had to itself."""
        self.alone: dict[str, SizeTimes] = {}
        """The same by client."""
        self.added: dict[str, float] = {}
        """Seconds by which a client lengthens the steps of others that it takes part in."""
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

    @property
    def between(self) -> int:
        """Tokens that a client may have in a step while nobody else has anything to run, but may have at any moment."""
        return self.sizes.beside_the_smallest(BETWEEN)

    def usual(self, client: str, tokens: int) -> float | None:
        """Seconds of a step without guests: this client's; anybody's while it had none. None: there was no such step yet."""
        return self.alone.get(client, self.sizes).of(tokens)

    def joining(self, guests: Collection[str], turn: str, tokens: int) -> set[str]:
        """Those clients that may take part in a step of `turn`, which has so many tokens of its own.

        None while no step without guests is known; nor who is known to add more than TOO_MUCH times what the step takes. These are tried again one
        by one: two that first came together are blamed together, and tell apart who is slow only when one comes without the other.
        """
        usual = self.usual(turn, tokens)
        if usual is None:
            return set()
        slow = {guest for guest in guests if self.added.get(guest, 0.0) > TOO_MUCH * usual}
        if slow:
            self.added[min(slow, key=lambda guest: (self.added[guest], guest))] *= RETRY
        return set(guests) - slow

    def learn(self, tokens: int, seconds: float, client: str = "") -> None:
        """A step that one client had to itself, of so many tokens, took so long."""
        self.cost.add(tokens, seconds)
        self.sizes.add(tokens, seconds)
        times = self.alone.pop(client, None) or SizeTimes()
        times.add(tokens, seconds)
        remember(self.alone, client, times)

    def _learn_guests(self, seconds: float, tokens: Mapping[str, int], turn: str) -> None:
        """A step of `turn` with guests: what it took beyond the usual is shared out among them."""
        guests = [client for client in tokens if client != turn]
        usual = self.usual(turn, tokens.get(turn, 0))
        if usual is None or turn not in tokens:
            return
        missed = seconds - usual - sum(self.added.get(guest, 0.0) for guest in guests)
        for guest in guests:
            remember(self.added, guest, max(0.0, self.added.pop(guest, 0.0) + missed / (2 * len(guests))))

    def took(self, seconds: float, tokens: Mapping[str, int], turn: str = "") -> None:
        """A step of `turn` took so long, in which each client had so many tokens: all share what it takes without any, and each pays for its own."""
        total = sum(tokens.values())
        if not total:
            return
        if len(tokens) == 1:
            self.learn(total, seconds, next(iter(tokens)))
        else:
            self.cost.add(total, seconds)
            self._learn_guests(seconds, tokens, turn)
        fixed, slope = self.fixed / len(tokens), self.cost.slope
        for client, count in tokens.items():
            self.used[client] = self.used.get(client, self.least) + fixed + slope * count


def remember(table: dict[str, Value], client: str, value: Value) -> None:
    """Put down a client's newest value, and forget the clients that had none for longest, beyond REMEMBERED."""
    table[client] = value
    while len(table) > REMEMBERED:
        del table[next(iter(table))]


def fitting(asked: Sequence[tuple[Asked, int]], room: int) -> Collection[Asked]:
    """Those of the requests, in their order, whose tokens fit the room together."""
    found = []
    for one, tokens in asked:
        if tokens <= room:
            found.append(one)
            room -= tokens
    return found
