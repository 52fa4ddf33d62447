"""Decides whose turn a step is where several clients compete for the engine: each gets an equal share of its time, however much it asks for.

Guests are the clients that take part in a step whose turn is another's.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from memdec.server.worker.draft_length import StepCost

BACKGROUND = "background"
"""The client of replays, which gets a turn only when no other client wants one."""
MANY = 1 << 20  # tokens: no bound
BESIDE = 2.0  # times as long as without guests that a step may take; 1.5 was no better (measured)
BETWEEN = 3.0  # the same while a neighbour has no request: its next one waits for half of such a step
SMALL = 8  # a step of at most this many tokens shows what one request alone takes
LATEST = 0.1  # weight of a new step in the mean of its size
TOO_MUCH = 1.0  # times the usual step: a client that lengthens others' steps by more is kept out of them, however few its rows
RETRY = 0.97  # factor on what a client was measured to add, for each step it is kept out of: after some dozens it is measured again
REMEMBERED = 256  # clients whose step times are kept, the latest ones
Asked = TypeVar("Asked")
Value = TypeVar("Value")


class SizeTimes:
    """Seconds of a step by its number of tokens: a mean for each power of two.

    A line through all recent steps would not do: while a greedy client fills the steps they all have one size, and the time of small steps would
    be forgotten.
    """

    def __init__(self) -> None:
        self.means: dict[int, tuple[float, float]] = {}
        """Bit length of the number of tokens -> mean tokens and mean seconds, the latest steps counting most."""

    def add(self, tokens: int, seconds: float) -> None:
        """Record a step of `tokens` tokens that took `seconds`."""
        size = tokens.bit_length()
        x, y = self.means.get(size, (float(tokens), seconds))
        self.means[size] = x + LATEST * (tokens - x), y + LATEST * (seconds - y)

    def of(self, tokens: int) -> float | None:
        """Mean seconds of a step of about `tokens` tokens, from the nearest size that is known, the smaller of two; None if no size is."""
        size = tokens.bit_length()
        known = min(self.means, key=lambda other: (abs(other - size), other), default=None)
        return None if known is None else self.means[known][1]

    def beside_the_smallest(self, times: float = BESIDE) -> int:
        """Number of tokens that may be added to a step of the smallest size until it takes `times` as long.

        It is 1 until a size of at most SMALL tokens is known, and a larger one.
        """
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
    """Gives each step to the client that has had least of the engine's time; guests take part as far as they hardly delay it.

    The time of a step is measured by its number of tokens. Each guest may have as many tokens as make the smallest steps take BESIDE times as
    long; so beside one other client a request takes about twice its time, however much that client asks for.

    Tokens aren't all that counts: rows that are sampled, are drafted for or want log-probabilities cost more than their number suggests, in the front
    end too. So the time that each client adds to the steps of others is measured as well; one that adds too much is kept out, and tried again later.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self.sizes = SizeTimes()
        """Times of all steps without guests."""
        self.alone: dict[str, SizeTimes] = {}
        """Client -> times of its steps without guests."""
        self.added: dict[str, float] = {}
        """Client -> seconds by which it lengthens a step as a guest."""
        self.used: dict[str, float] = {}
        """Client -> seconds of the engine that it has used. One that comes, or comes back, starts at `least`: time that it didn't use is gone."""
        self.least = 0.0
        """Seconds that the client of the last turn had used, the least of all then."""

    def turn(self, clients: Iterable[str]) -> str:
        """The client that gets the next step, of those that have requests to run."""
        wanting = sorted(clients)
        for client in wanting:
            self.used[client] = max(self.used.get(client, 0.0), self.least)
        self.used = {client: seconds for client, seconds in self.used.items() if client in wanting or seconds > self.least}
        first = min((c for c in wanting if c != BACKGROUND), key=self.used.__getitem__, default=BACKGROUND)
        self.least = self.used[first]
        return first

    @property
    def fixed(self) -> float:
        """Estimated seconds of a step that don't depend on its tokens; 0 before the first step."""
        count, x, _, y, _ = self.cost.sums
        return max(0.0, y - self.cost.slope * x) / count if count else 0.0

    @property
    def guests(self) -> int:
        """Number of tokens, at least one, that each guest may have in a step."""
        return self.sizes.beside_the_smallest()

    @property
    def between(self) -> int:
        """Number of tokens that a client may have in a step while no other has requests, but a neighbour may send one at any moment."""
        return self.sizes.beside_the_smallest(BETWEEN)

    def usual(self, client: str, tokens: int) -> float | None:
        """Mean seconds of a client's step without guests; of anybody's while it had none; None before the first such step."""
        return self.alone.get(client, self.sizes).of(tokens)

    def joining(self, guests: Collection[str], turn: str, tokens: int) -> set[str]:
        """The guests that may take part in a step of `turn`, which has `tokens` tokens of its own.

        No guest may before a step without guests was measured; nor one that is known to add more than TOO_MUCH times such a step. Those are tried again
        one by one: two guests that came together are blamed together, and only a step with one of them shows which is slow.
        """
        usual = self.usual(turn, tokens)
        if usual is None:
            return set()
        slow = {guest for guest in guests if self.added.get(guest, 0.0) > TOO_MUCH * usual}
        if slow:
            self.added[min(slow, key=lambda guest: (self.added[guest], guest))] *= RETRY
        return set(guests) - slow

    def learn(self, tokens: int, seconds: float, client: str = "") -> None:
        """Record a client's step without guests: `tokens` tokens took `seconds`."""
        self.cost.add(tokens, seconds)
        self.sizes.add(tokens, seconds)
        times = self.alone.pop(client, None) or SizeTimes()
        times.add(tokens, seconds)
        remember(self.alone, client, times)

    def _learn_guests(self, seconds: float, tokens: Mapping[str, int], turn: str) -> None:
        """Divide the time that a step of `turn` took beyond the usual among its guests; `tokens`: client -> tokens in the step."""
        guests = [client for client in tokens if client != turn]
        usual = self.usual(turn, tokens.get(turn, 0))
        if usual is None or turn not in tokens:
            return
        missed = seconds - usual - sum(self.added.get(guest, 0.0) for guest in guests)
        for guest in guests:
            remember(self.added, guest, max(0.0, self.added.pop(guest, 0.0) + missed / (2 * len(guests))))

    def took(self, seconds: float, tokens: Mapping[str, int], turn: str = "") -> None:
        """Charge the clients for a step of `turn` (`tokens`: client -> tokens in it): all share its fixed part, and each pays for its own tokens."""
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
    """Set a client's value, and drop the values that were set longest ago, beyond REMEMBERED of them."""
    table[client] = value
    while len(table) > REMEMBERED:
        del table[next(iter(table))]


def fitting(asked: Sequence[tuple[Asked, int]], room: int) -> Collection[Asked]:
    """The requests, taken in their order, whose tokens together fit into `room`; `asked` are pairs of request and tokens."""
    admitted = []
    for one, tokens in asked:
        if tokens <= room:
            admitted.append(one)
            room -= tokens
    return admitted
